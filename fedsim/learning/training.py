"""Local training of the clients of one chunk: one after the other, or as one `torch.func` computation.

`fused` has a third way behind the same interface, and `execution` chooses.

An update is in gradient units: the local displacement divided by the local learning rate. With one local
step it is the gradient of the batch itself, so that a noise level means the same for FedSGD and FedAvg.
"""

import copy
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from fedsim.learning import batch_norm
from fedsim.learning.batches import ImageStore, Indices
from fedsim.learning.layout import ParameterLayout
from fedsim.learning.models import Model
from fedsim.replay import Replayed

MemoryFormat = Literal["contiguous", "channels_last"]
Precision = Literal["float32", "bfloat16"]


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

    def select(self, rows: NDArray[np.int64]) -> "LocalResult":
        """Return the clients of some rows, in that order."""
        at = torch.from_numpy(rows)
        return LocalResult(self.updates[at], self.losses[at], self.statistics[at])


class LocalTrainer(Protocol):
    """Trains the clients of a chunk from the same weights."""

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """Train K clients from `weights` [d]; `schedules[k]` lists the batches of client k."""
        ...


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
        precision: Precision = "float32",
    ) -> None:
        """Prepare the flat weights and gradients; `learning_rate` is the clients'.

        With the precision bfloat16 kernels compute in it where PyTorch's autocast allows; weights stay float32.
        """
        self.module = copy.deepcopy(model.module).train()
        self.normalizers = tuple(batch_norm.layers(self.module))
        self.data, self.learning_rate = data, learning_rate
        self.channels_last, self.autocast = memory_format == "channels_last", precision == "bfloat16"
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
        start = weights.index_select(0, self.order)
        updates = weights.new_empty(len(schedules), len(weights))
        losses, statistics = [], []
        for row, batches in zip(updates, schedules, strict=True):
            losses.append(self._train_client(start, batches, row))
            statistics.append(batch_norm.collect_statistics(self.normalizers, weights).detach())
        return LocalResult(updates.index_select(1, self.places), torch.stack(losses), torch.stack(statistics))

    def _train_client(self, start: Tensor, batches: list[Indices], update: Tensor) -> Tensor:
        self.weights.copy_(start)
        total = start.new_zeros(())
        for batch in batches:
            images, labels = self.data.take(batch)
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            self.gradient.zero_()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
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

        def step(weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            gradients, (losses, statistics) = grad(loss, has_aux=True)(weights, images, labels)
            return gradients, losses, statistics

        self._step = Replayed(vmap(step, in_dims=(0, 0, 0)))
        self._first_step = Replayed(vmap(step, in_dims=(None, 0, 0)))

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """See `LocalTrainer.train`."""
        if len({tuple(map(len, batches)) for batches in schedules}) == 1:
            return self._train_equal(weights, schedules)
        return LocalResult.join([self._train_equal(weights, [batches]) for batches in schedules])

    def _train_equal(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        steps = [self.data.take(np.stack(batches)) for batches in zip(*schedules, strict=True)]
        updates, total, statistics = self._first_step(weights, *steps[0])
        for images, labels in steps[1:]:
            current = weights - self.learning_rate * updates
            gradients, loss, statistics = self._step(current, images, labels)
            updates = updates + gradients
            total = total + loss
        return LocalResult(updates, total / len(steps), statistics)
