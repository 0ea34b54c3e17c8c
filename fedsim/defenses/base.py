"""What a defense is: two functions, one on the clients and one on the server, both the identity by default."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from fedsim.learning.models import Model
from fedsim.schema import Schema

Public = Mapping[str, Tensor]
"""What a defense publishes for one round: known to clients, server and every attacker."""

PER_SAMPLE_BYTES = 256 * 2**20
"""Per-sample gradients are made in pieces of at most this many bytes."""


@dataclass
class ClientBatch:
    """Clients of one chunk whose local batches have the same size k.

    Attributes:
        rows: Their rows in the chunk's update matrix, shape [k].
        images: First local batch of each, shape [k, B, C, H, W], values in [0, 1].
        labels: Its labels, shape [k, B].
    """

    rows: Tensor
    images: Tensor
    labels: Tensor


@dataclass
class PublicContext:
    """What is at hand when a defense prepares: nothing private.

    Attributes:
        model: The architecture.
        weights: Global weights, shape [d].
        root_images: A small public set, shape [R, C, H, W].
        root_labels: Its labels, shape [R].
        generator: Randomness of this preparation.
    """

    model: Model
    weights: Tensor
    root_images: Tensor
    root_labels: Tensor
    generator: torch.Generator


@dataclass
class ClientContext:
    """What the K clients of a chunk have when they protect their updates.

    Attributes:
        model: The architecture.
        weights: Global weights of this round, shape [d].
        batches: The clients' first local batches, grouped by size; together they cover all K rows.
        generators: One private random stream a client, K of them.
        public: What the defense published for this round.
        local_steps: Local steps a client took; with 1 an update is the plain batch gradient.
    """

    model: Model
    weights: Tensor
    batches: Sequence[ClientBatch]
    generators: Sequence[torch.Generator]
    public: Public = field(default_factory=dict)
    local_steps: int = 1

    def normal(self, *shape: int) -> Tensor:
        """Draw N(0, 1) of shape [K, *shape], each row from its client's own stream."""
        return self._rows(shape, lambda row, generator: row.normal_(generator=generator))

    def uniform(self, *shape: int) -> Tensor:
        """Draw U[0, 1) of shape [K, *shape], each row from its client's own stream."""
        return self._rows(shape, lambda row, generator: row.uniform_(generator=generator))

    def _rows(self, shape: tuple[int, ...], fill) -> Tensor:  # type: ignore[no-untyped-def]
        rows = self.weights.new_empty((len(self.generators), *shape))
        for row, generator in zip(rows, self.generators, strict=True):
            fill(row, generator)
        return rows

    def per_sample_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows [k], gradients [k, B, d]) in pieces that fit `PER_SAMPLE_BYTES`.

        Source: the vmap-over-grad recipe of PyTorch's function transforms.
        """

        def loss(weights: Tensor, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model.logits(weights, image[None]), label[None])

        gradient = vmap(vmap(grad(loss), in_dims=(None, 0, 0)), in_dims=(None, 0, 0))
        for batch in self.batches:
            one_client = batch.labels.shape[1] * self.weights.numel() * self.weights.element_size()
            width = max(1, PER_SAMPLE_BYTES // one_client)
            pieces = zip(
                batch.rows.split(width), batch.images.split(width), batch.labels.split(width), strict=True
            )
            for rows, images, labels in pieces:
                yield rows, gradient(self.weights, images, labels)


@dataclass
class ServerContext:
    """What the server has when it compensates.

    Attributes:
        model: The architecture.
        client_weights: Weight of each client in the aggregate, shape [n], summing to 1.
        round: Number of the round, from 0.
        public: What the defense published for this round.
    """

    model: Model
    client_weights: Tensor
    round: int
    public: Public = field(default_factory=dict)


class Defense:
    """A defense: override what it changes.

    A subclass that keeps memory between rounds on the server (error feedback, momentum) exposes it through
    `state_dict` and `load_state_dict`, so that checkpoints hold it.
    """

    refresh_rounds: int | None = None
    """`prepare` runs before round 0 and again every so many rounds; None: before round 0 only."""

    def prepare(self, context: PublicContext) -> Public:
        """Return what the scheme publishes for the coming rounds (e.g. slice bounds)."""
        return {}

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor | Sequence[Tensor]:
        """Protect K updates on their clients: [K, d] → [K, d], in gradient units.

        A scheme that works a client at a time may return a list of K vectors [d] instead. A client whose update is
        not finite or has another size than d is left out of the round, counted and named in the log.
        """
        return updates

    def compensate(self, aggregate: Tensor, context: ServerContext) -> Tensor:
        """Undo on the server what can be undone in the weighted mean of the updates: [d] → [d]."""
        return aggregate

    def upload_bytes(self, protected: Tensor) -> Tensor:
        """Bytes that each client sends for its row of `protected` [K, d], as a tensor [K]."""
        clients, dimension = protected.shape
        return torch.full((clients,), float(dimension * protected.element_size()))

    def secrets(self, context: ClientContext) -> dict[str, Tensor]:
        """Return what the clients would draw in secret to protect in `context`, each with a leading dimension K.

        Only the audit asks, to tell the oracle. It must not read more of the clients' streams than `protect` does
        up to that draw.
        """
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the server's memory of this defense."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


class DefenseSettings(Schema):
    """Base of the settings of a defense: `build` makes the defense itself."""

    def build(self) -> Defense:
        """Return a fresh defense."""
        raise NotImplementedError

    def needs_one_local_step(self) -> bool:
        """Whether the scheme is defined for one local step only (e.g. per-sample clipping)."""
        return False

    def strategies(self) -> tuple[str, ...]:
        """Return the names, in `fedsim.attacks.strategies`, of what an attacker who knows the scheme can do.

        All parameters of the scheme and what it publishes are known to such an attacker; its draws are not.
        """
        return ()

    def oracle_strategies(self) -> tuple[str, ...]:
        """Return the names of what an attacker can do who is also told the `secrets` of the round.

        Empty where there is no secret beside the noise itself: then the oracle is the adaptive attacker.
        """
        return ()
