"""How training images are divided among clients: IID, Dirichlet(α), or a fixed number of classes a client."""

import heapq
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedsim.errors import ConfigError
from fedsim.randomness import Purpose, numpy_stream
from fedsim.schema import Schema

Integers = NDArray[np.int64]

DIRICHLET_TRIES = 10
"""Draws of a Dirichlet partition before one that leaves a client too small is repaired."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which images each client holds, stored flat so that it scales to tens of thousands of clients.

    Attributes:
        order: Indices into the training set, client after client, ascending within a client, int64 [N].
        offsets: Client i holds `order[offsets[i]:offsets[i + 1]]`, int64 [clients + 1].
    """

    order: Integers
    offsets: Integers

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Integers:
        """Images of each client, int64 [clients]."""
        return np.diff(self.offsets)

    def client(self, index: int) -> Integers:
        """Return the indices of one client's images, ascending, int64 [n]; a view.

        Raises:
            IndexError: If there is no such client.
        """
        if not 0 <= index < self.clients:
            raise IndexError(f"client {index} of {self.clients}")
        return self.order[self.offsets[index] : self.offsets[index + 1]]

    def counts(self, labels: Integers, classes: int | None = None) -> Integers:
        """Return how many images of each class each client holds, int64 [clients, classes].

        Args:
            labels: Labels of the whole training set.
            classes: Number of classes; by default the largest label plus one.
        """
        classes = int(labels.max()) + 1 if classes is None else classes
        owners = np.repeat(np.arange(self.clients), self.sizes)
        cells = np.bincount(owners * classes + labels[self.order], minlength=self.clients * classes)
        return cells.reshape(self.clients, classes)


class IIDConfig(Schema):
    """Every client gets a random sample of the same size; sizes differ by one at most."""

    name: Literal["iid"] = "iid"
    min_per_client: int = Field(default=1, ge=1)
    """Least number of images that a client may hold; too few images altogether are an error."""

    def owners(self, labels: Integers, clients: int, rng: np.random.Generator) -> Integers:
        """Return the client of each image, int64 [N], for `labels` [N]."""
        return rng.permutation(np.arange(len(labels)) % clients)


class DirichletConfig(Schema):
    """Each class is divided by shares drawn from a symmetric Dirichlet distribution over the clients.

    Source:
        Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019;
        Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022.
    """

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Concentration α > 0: near 0 a class lies with few clients; the larger, the closer to IID."""
    min_per_client: int = Field(default=1, ge=1)
    """Least number of images that a client holds.

    A draw that leaves a client below is repeated; after ten tries, single images move from the largest
    client, out of its largest class, to those that lack any.
    """

    def owners(self, labels: Integers, clients: int, rng: np.random.Generator) -> Integers:
        """Return the client of each image, int64 [N], for `labels` [N]."""
        classes, totals = np.unique(labels, return_counts=True)
        for _ in range(DIRICHLET_TRIES):
            counts = self._draw(totals, clients, rng)
            if counts.sum(axis=1).min() >= self.min_per_client:
                break
        else:
            _fill_up(counts, self.min_per_client)
        return _deal(labels, classes, counts, rng)

    def _draw(self, totals: Integers, clients: int, rng: np.random.Generator) -> Integers:
        """Draw how many images of each class go to each client, int64 [clients, classes]."""
        shares = rng.dirichlet(np.full(clients, self.alpha), size=len(totals))
        # The random start rounds without bias; with none, the same clients would lose in every class.
        starts = rng.random((len(totals), 1))
        ends = np.floor(np.cumsum(shares, axis=1) * totals[:, None] + starts).astype(np.int64)
        ends[:, -1] = totals
        return np.diff(np.minimum(ends, totals[:, None]), axis=1, prepend=0).T.copy()


class ShardsConfig(Schema):
    """Every client holds exactly `classes_per_client` classes, and every image is used.

    Each class is cut into shards of nearly equal size (they differ by one image at most), the more of them
    the more images it has; a client gets one shard of each of its classes. This is the partition of FedAvg's
    paper with shards that do not straddle two classes, which makes the number of classes exact.

    Source:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017.
    """

    name: Literal["shards"] = "shards"
    classes_per_client: int = Field(default=2, ge=1)
    """Number of different classes that each client holds."""
    min_per_client: int = Field(default=1, ge=1)
    """Least number of images that a client may hold; if the shards come out smaller, that is an error."""

    def owners(self, labels: Integers, clients: int, rng: np.random.Generator) -> Integers:
        """Return the client of each image, int64 [N], for `labels` [N].

        Raises:
            ConfigError: If no such partition exists or a client would hold too few images.
        """
        classes, totals = np.unique(labels, return_counts=True)
        self._check(totals, clients)
        shards = _shards_of_classes(totals, clients, self.classes_per_client)
        holds = _deal_shards(shards, clients, self.classes_per_client, rng)
        counts = np.zeros(holds.shape, np.int64)
        for column, (total, number) in enumerate(zip(totals, shards, strict=True)):
            sizes = total // number + (np.arange(number) < total % number)
            counts[holds[:, column], column] = rng.permutation(sizes)
        smallest = int(counts.sum(axis=1).min())
        if smallest < self.min_per_client:
            raise ConfigError(
                f"data.partition: the shards leave a client {smallest} images, "
                f"fewer than min_per_client {self.min_per_client}: lower it, or have fewer clients"
            )
        return _deal(labels, classes, counts, rng)

    def _check(self, totals: Integers, clients: int) -> None:
        wanted, present = self.classes_per_client, len(totals)
        asked = f"data.partition: {clients} clients with classes_per_client {wanted}"
        if wanted > present:
            raise ConfigError(f"{asked}: the data has only {present} classes")
        if clients * wanted < present:
            raise ConfigError(f"{asked} have no room for {present} classes: raise either")
        if np.minimum(totals, clients).sum() < clients * wanted:
            raise ConfigError(f"{asked}: the classes are too small or too uneven for that: lower either")


PartitionConfig = Annotated[IIDConfig | DirichletConfig | ShardsConfig, Field(discriminator="name")]


def partition(labels: Integers, indices: Integers, clients: int, config: PartitionConfig, seed: int) -> Partition:
    """Divide training images among clients; each of `indices` goes to exactly one client.

    Args:
        labels: Labels of the whole training set, int64 [N].
        indices: The images to divide, int64 [n], without repetition.
        clients: Number of clients.
        config: How.
        seed: Seed of the run; the result is a function of the arguments alone.

    Raises:
        ConfigError: If a client would hold fewer than `min_per_client` images, or shards cannot be cut.
    """
    if clients * config.min_per_client > len(indices):
        raise ConfigError(
            f"data.partition: {clients} clients with min_per_client {config.min_per_client} need "
            f"{clients * config.min_per_client:,} images, but there are {len(indices):,}"
        )
    rng = numpy_stream(seed, Purpose.PARTITION)
    owners = config.owners(labels[indices], clients, rng)
    order = indices[np.lexsort((indices, owners))]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=clients))])
    return Partition(order, offsets)


def _deal(labels: Integers, classes: Integers, counts: Integers, rng: np.random.Generator) -> Integers:
    """Draw which images go where, given how many of each class: `counts` [clients, classes]."""
    owners = np.empty(len(labels), np.int64)
    for column, label in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        owners[members] = np.repeat(np.arange(len(counts)), counts[:, column])
    return owners


def _fill_up(counts: Integers, minimum: int) -> None:
    """Move single images, in place, from the largest client to those below `minimum`.

    While one is below and there are enough images in all, the largest is above, so it can always give.
    """
    sizes = counts.sum(axis=1)
    donors = [(-int(size), client) for client, size in enumerate(sizes)]
    heapq.heapify(donors)
    for client in np.flatnonzero(sizes < minimum):
        for _ in range(minimum - sizes[client]):
            size, donor = donors[0]
            column = counts[donor].argmax()
            counts[donor, column] -= 1
            counts[client, column] += 1
            heapq.heapreplace(donors, (size + 1, donor))


def _shards_of_classes(totals: Integers, clients: int, classes_per_client: int) -> Integers:
    """Return the number of shards of each class, int64 [classes], summing to clients × classes_per_client.

    Every class gets one; each further shard goes to the class whose shards are the largest, unless it has
    as many as there are clients or images.
    """
    shards = np.ones(len(totals), np.int64)
    largest = [(-float(total), column) for column, total in enumerate(totals) if min(total, clients) > 1]
    heapq.heapify(largest)
    for _ in range(clients * classes_per_client - len(totals)):
        _, column = heapq.heappop(largest)
        shards[column] += 1
        if shards[column] < min(totals[column], clients):
            heapq.heappush(largest, (-totals[column] / shards[column], column))
    return shards


def _deal_shards(
    shards: Integers, clients: int, classes_per_client: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Choose each client's classes, bool [clients, classes].

    Each client in turn takes the classes with the most shards left, ties at random; as no class has more
    shards than there are clients, this never gets stuck. Which client has which turn is random, too.
    """
    holds = np.zeros((clients, len(shards)), bool)
    left = shards.copy()
    for turn, ties in zip(rng.permutation(clients), rng.random(holds.shape), strict=True):
        chosen = np.argsort(left + ties)[-classes_per_client:]
        holds[turn, chosen] = True
        left[chosen] -= 1
    return holds
