"""What every process of the engine needs to know of one simulation, and what a worker builds from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregation.base import Aggregation
from fedsim.aggregation.plain import PlainAggregation
from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset
from fedsim.data.partitions import Partition
from fedsim.defenses.base import ClientBatch, ClientContext, Defense, Public
from fedsim.learning.batches import ImageStore, Indices, local_batches
from fedsim.learning.execution import build_trainer
from fedsim.learning.models import Model, build_model
from fedsim.learning.training import LocalTrainer
from fedsim.participation import Participation, participation
from fedsim.randomness import Purpose, numpy_streams, torch_streams

T = TypeVar("T")
Handle = tuple[str, list[Any]]
"""A simulation's key, and references to its `SessionSpec` and `Dataset` in a list, so that Ray leaves them be."""


@dataclass(frozen=True)
class SessionSpec:
    """One simulation, as it is put into the object store once and read by every process.

    Attributes:
        config: The experiment.
        partition: Which images each client holds.
        root: Indices of the public root set among the training images.
    """

    config: ExperimentConfig
    partition: Partition
    root: Indices

    def build_model(self, dataset: Dataset) -> Model:
        """Build the model for the images of `dataset`, initialised from the experiment's seed."""
        return build_model(self.config.model, dataset.shape, dataset.classes, self.config.seed)

    def participation(self, round_: int) -> Participation:
        """Draw who is sampled for a round, who drops out, who is late and whose updates are used."""
        federation = self.config.federation
        return participation(
            self.config.seed,
            round_,
            population=federation.clients,
            wanted=federation.clients_per_round,
            over_sampling=federation.over_sampling,
            dropout=federation.dropout,
            stragglers=federation.stragglers,
        )

    def cohort(self, round_: int) -> tuple[int, ...]:
        """Return the clients of a round whose updates are used, in client order."""
        return self.participation(round_).clients

    def schedule(self, round_: int, client: int) -> list[Indices]:
        """Draw the batches of one client in one round."""
        return self.schedules(round_, [client])[0]

    def schedules(self, round_: int, clients: Sequence[int]) -> list[list[Indices]]:
        """Draw the batches of some clients in one round."""
        federation = self.config.federation
        how = federation.batch_size, federation.local_steps, federation.local_epochs
        streams = numpy_streams(self.config.seed, Purpose.BATCHES, round_, last=clients)
        return [
            local_batches(self.partition.client(client), rng, *how)
            for client, rng in zip(clients, streams, strict=True)
        ]


class Lazy(Sequence[T]):
    """A sequence that is made when it is first looked at."""

    def __init__(self, make: Callable[[], list[T]]) -> None:
        """Make the items by `make`."""
        self._make = make

    @cached_property
    def _items(self) -> list[T]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """Return an item or some."""
        return self._items[index]

    def __len__(self) -> int:
        """Return how many items there are."""
        return len(self._items)


@dataclass
class Session:
    """What a worker holds of one simulation: the model, the data on its device, the trainer, the defense."""

    spec: SessionSpec
    dataset: Dataset
    device: torch.device
    aggregation: Aggregation = field(default_factory=PlainAggregation)

    @cached_property
    def model(self) -> Model:
        """The model; its module is in train mode except during an evaluation."""
        model = self.spec.build_model(self.dataset).to(self.device)
        model.module.train()
        return model

    @cached_property
    def train_data(self) -> ImageStore:
        """All training images, of all clients."""
        return ImageStore.of(self.dataset.train_images, self.dataset.train_labels, self.device)

    @cached_property
    def test_data(self) -> ImageStore:
        """The test images."""
        return ImageStore.of(self.dataset.test_images, self.dataset.test_labels, self.device)

    @cached_property
    def defense(self) -> Defense:
        """The defense; a worker uses its client half."""
        return self.spec.config.defense.build()

    @cached_property
    def trainer(self) -> LocalTrainer:
        """The local trainer in the execution that the config or the rule chose."""
        config, device = self.spec.config, self.device
        ways = config.execution(device), config.memory_format(device), config.runtime.precision
        return build_trainer(self.model, self.train_data, config.federation.learning_rate, *ways)

    def client_context(
        self,
        weights: Tensor,
        public: Public,
        batches: list[Indices],
        purpose: Purpose,
        round_: int,
        streams: list[int],
        local_steps: int,
    ) -> ClientContext:
        """Gather what K clients have when they protect; most defenses look at little of it, so it is made lazily.

        Args:
            weights: Global weights, shape [d].
            public: What the defense published.
            batches: First local batch of each client.
            purpose: What the clients' private randomness is for.
            round_: The round.
            streams: Counter of each client's private randomness.
            local_steps: Local steps that the clients took.
        """
        seed, device = self.spec.config.seed, self.device
        return ClientContext(
            model=self.model,
            weights=weights,
            batches=Lazy(lambda: self._client_batches(batches)),
            generators=Lazy(lambda: torch_streams(seed, purpose, round_, last=streams, device=device)),
            public=public,
            local_steps=local_steps,
        )

    def _client_batches(self, batches: list[Indices]) -> list[ClientBatch]:
        sizes = np.array([len(batch) for batch in batches])
        groups = []
        for size in sorted(set(sizes.tolist())):
            rows = np.flatnonzero(sizes == size)
            images, labels = self.train_data.take(np.stack([batches[row] for row in rows]))
            groups.append(ClientBatch(torch.from_numpy(rows).to(self.device), images, labels))
        return groups
