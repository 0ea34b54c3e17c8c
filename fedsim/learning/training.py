"""Local training of the clients of one chunk, two ways behind one interface.

`LoopTrainer` trains one client after the other with ordinary autograd; `VectorizedTrainer` trains all of
them as one `torch.func` computation. The rule that chooses (`choose_execution`) looks at the device and the
batch size only, so that the same run always takes the same path. On a CPU at one thread, vectorising pays
for small batches alone: `benchmarks/engine.py` measures it. There the loop keeps the images and filters of the
convolutional models channels-last, whose kernels are faster: `benchmarks/local_step.py`.

An update is in gradient units: the local displacement divided by the local learning rate. With one local
step it is the gradient of the batch itself, so that a noise level means the same for FedSGD and FedAvg.
"""

import copy
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from fedsim.learning import batch_norm
from fedsim.learning.batches import ImageStore, Indices
from fedsim.learning.layout import ParameterLayout
from fedsim.learning.models import Model

Execution = Literal["loop", "vectorized"]
MemoryFormat = Literal["contiguous", "channels_last"]
VECTORIZED_BATCH = 8
"""Largest local batch at which vectorising over clients wins on a CPU."""


@dataclass(frozen=True)
class LocalResult:
    """What K clients computed.

    Attributes:
        updates: Shape [K, d], in gradient units.
        losses: Mean loss over a client's local steps, shape [K].
        statistics: Batch-norm statistics of the last step, shape [K, b].
    """

    updates: Tensor
    losses: Tensor
    statistics: Tensor

    @classmethod
    def join(cls, parts: "list[LocalResult]") -> "LocalResult":
        """Put the clients of several parts one after the other."""
        return cls(
            torch.cat([part.updates for part in parts]),
            torch.cat([part.losses for part in parts]),
            torch.cat([part.statistics for part in parts]),
        )


class LocalTrainer(Protocol):
    """Trains the clients of a chunk from the same weights."""

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """Train K clients from `weights` [d]; `schedules[k]` lists the batches of client k."""
        ...


def choose_execution(device: torch.device, batch_size: int) -> Execution:
    """Return the faster execution for this device and local batch size."""
    return "vectorized" if device.type == "cuda" or batch_size <= VECTORIZED_BATCH else "loop"


def choose_memory_format(device: torch.device, takes_channels_last: bool) -> MemoryFormat:
    """Return the faster memory format for this device and a model that takes channels-last images or not."""
    return "channels_last" if device.type == "cpu" and takes_channels_last else "contiguous"


def build_trainer(
    model: Model,
    data: ImageStore,
    learning_rate: float,
    execution: Execution,
    memory_format: MemoryFormat = "contiguous",
) -> LocalTrainer:
    """Return the trainer of the wanted execution; on a GPU it makes do with the memory that there is.

    `memory_format` is the loop's; the vectorised execution leaves tensors as they are.
    """
    trainer: LocalTrainer
    if execution == "loop":
        trainer = LoopTrainer(model, data, learning_rate, memory_format)
    else:
        trainer = VectorizedTrainer(model, data, learning_rate)
    return HalvingTrainer(trainer) if data.images.is_cuda else trainer


class HalvingTrainer:
    """Trains a chunk in two halves, and these likewise, when the memory of the device runs out."""

    def __init__(self, trainer: LocalTrainer) -> None:
        """Train by `trainer`."""
        self.trainer = trainer

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """See `LocalTrainer.train`; a single client that does not fit raises torch.OutOfMemoryError."""
        try:
            return self.trainer.train(weights, schedules)
        except torch.OutOfMemoryError:
            if len(schedules) == 1:
                raise
        # Outside the except block, where the failed attempt's tensors are no longer held by its traceback.
        torch.cuda.empty_cache()
        middle = len(schedules) // 2
        return LocalResult.join([self.train(weights, half) for half in (schedules[:middle], schedules[middle:])])


class LoopTrainer:
    """One client after the other, on a private copy of the module whose parameters are views of one vector.

    That vector holds each parameter as it lies in memory: channels-last filters in the order O, H, W, I.
    """

    def __init__(
        self,
        model: Model,
        data: ImageStore,
        learning_rate: float,
        memory_format: MemoryFormat = "contiguous",
    ) -> None:
        """Prepare the flat weights and gradients; `learning_rate` is the clients'."""
        self.module = copy.deepcopy(model.module).train()
        self.normalizers = tuple(batch_norm.layers(self.module))
        self.data, self.learning_rate = data, learning_rate
        self.channels_last = memory_format == "channels_last"
        device = data.images.device
        self.weights = torch.zeros(model.layout.dimension, device=device)
        self.gradient = torch.zeros_like(self.weights)
        positions = torch.arange(model.layout.dimension, device=device)
        self.order = torch.empty_like(positions)
        stored = zip(
            self.module.parameters(),
            self._views(model.layout, self.weights),
            self._views(model.layout, self.gradient),
            self._views(model.layout, self.order),
            model.layout.views(positions).values(),
            strict=True,
        )
        for parameter, value, gradient, order, position in stored:
            parameter.data, parameter.grad = value, gradient
            order.copy_(position)
        self.places = self.order.argsort()

    def _views(self, layout: ParameterLayout, vector: Tensor) -> list[Tensor]:
        """Return views of a vector [d] in the parameters' shapes, in the memory format."""
        views = []
        for part, shape in zip(vector.split(layout.sizes), layout.shapes, strict=True):
            if self.channels_last and len(shape) == 4:
                outputs, inputs, height, width = shape
                views.append(part.view(outputs, height, width, inputs).permute(0, 3, 1, 2))
            else:
                views.append(part.view(shape))
        return views

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """See `LocalTrainer.train`."""
        start = weights[self.order]
        updates = weights.new_empty(len(schedules), len(weights))
        losses, statistics = [], []
        for row, batches in zip(updates, schedules, strict=True):
            losses.append(self._train_client(start, batches, row))
            statistics.append(batch_norm.collect_statistics(self.normalizers, weights).detach())
        return LocalResult(updates[:, self.places], torch.stack(losses), torch.stack(statistics))

    def _train_client(self, start: Tensor, batches: list[Indices], update: Tensor) -> Tensor:
        self.weights.copy_(start)
        total = start.new_zeros(())
        for batch in batches:
            images, labels = self.data.take(batch)
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            self.gradient.zero_()
            loss = F.cross_entropy(self.module(images), labels)
            loss.backward()
            total += loss.detach()
            if len(batches) > 1:
                self.weights.add_(self.gradient, alpha=-self.learning_rate)
        if len(batches) > 1:
            torch.sub(start, self.weights, out=update).div_(self.learning_rate)
        else:
            update.copy_(self.gradient)
        return total / len(batches)


class VectorizedTrainer:
    """All clients of a chunk as one batched computation; clients with unequal batches are trained one by one."""

    def __init__(self, model: Model, data: ImageStore, learning_rate: float) -> None:
        """Prepare the batched gradient; `learning_rate` is the clients'."""
        self.data, self.learning_rate = data, learning_rate
        model.module.train()

        def loss(weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            logits, statistics = model.logits_and_statistics(weights, images)
            value = F.cross_entropy(logits, labels)
            return value, (value.detach(), statistics.detach())

        self._step = vmap(grad(loss, has_aux=True), in_dims=(0, 0, 0))
        self._first_step = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0))

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """See `LocalTrainer.train`."""
        if len({tuple(map(len, batches)) for batches in schedules}) == 1:
            return self._train_equal(weights, schedules)
        return LocalResult.join([self._train_equal(weights, [batches]) for batches in schedules])

    def _train_equal(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        steps = [self.data.take(np.stack(batches)) for batches in zip(*schedules, strict=True)]
        updates, (total, statistics) = self._first_step(weights, *steps[0])
        for images, labels in steps[1:]:
            current = weights - self.learning_rate * updates
            gradients, (loss, statistics) = self._step(current, images, labels)
            updates = updates + gradients
            total = total + loss
        return LocalResult(updates, total / len(steps), statistics)
