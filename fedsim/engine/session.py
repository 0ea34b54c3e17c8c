"""What every process of the engine needs to know of one simulation, and what a worker builds from it."""

from dataclasses import dataclass, field
from functools import cached_property

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
from fedsim.learning.models import Model, build_model
from fedsim.learning.training import LocalTrainer, build_trainer, choose_execution
from fedsim.randomness import Purpose, numpy_stream, torch_stream


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

    def cohort(self, round_: int) -> list[int]:
        """Draw the clients of a round, in client order."""
        federation = self.config.federation
        rng = numpy_stream(self.config.seed, Purpose.COHORT, round_)
        drawn = rng.choice(federation.clients, federation.clients_per_round, replace=False)
        return sorted(drawn.tolist())

    def schedule(self, round_: int, client: int) -> list[Indices]:
        """Draw the batches of one client in one round."""
        federation = self.config.federation
        rng = numpy_stream(self.config.seed, Purpose.BATCHES, round_, client)
        indices = self.partition.client(client)
        return local_batches(indices, rng, federation.batch_size, federation.local_steps, federation.local_epochs)


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
        federation, wanted = self.spec.config.federation, self.spec.config.runtime.execution
        execution = choose_execution(self.device, federation.batch_size) if wanted == "auto" else wanted
        return build_trainer(self.model, self.train_data, federation.learning_rate, execution)

    def client_context(
        self,
        weights: Tensor,
        public: Public,
        batches: list[Indices],
        generators: list[torch.Generator],
        local_steps: int,
    ) -> ClientContext:
        """Gather what the clients of a chunk have when they protect; `batches[k]` is the first of client k."""
        sizes = np.array([len(batch) for batch in batches])
        groups = []
        for size in sorted(set(sizes.tolist())):
            rows = np.flatnonzero(sizes == size)
            images, labels = self.train_data.take(np.stack([batches[row] for row in rows]))
            groups.append(ClientBatch(torch.from_numpy(rows).to(self.device), images, labels))
        return ClientContext(self.model, weights, groups, generators, public, local_steps)

    def generator(self, purpose: Purpose, round_: int, client: int) -> torch.Generator:
        """Return a client's private stream on this worker's device."""
        return torch_stream(self.spec.config.seed, purpose, round_, client, device=self.device)
