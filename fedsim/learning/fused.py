"""One local step of all clients of a chunk in one pass: their weights are the same, so only gradients differ.

The images of all clients run through each layer as one batch, forward and backward; only where a layer has
parameters does the backward pass take each client's part of the batch by itself, for that client's own gradient.

Source: Goodfellow, "Efficient per-example gradient computations", 2015; here with a client for an example.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore, Indices
from fedsim.learning.models import Model
from fedsim.learning.training import LocalResult, LoopTrainer, MemoryFormat

IMAGES = 128
"""Images in a pass, unless one client has more: activations beyond a core's cache cost more than passes."""
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
"""Its mask says which of the gradients by input, weight and bias are computed."""


class FusedTrainer:
    """Trains for one local step; the model must treat each image by itself, as batch norm does not.

    A client that is alone in a pass is trained by a `LoopTrainer`: a pass has its price.
    """

    def __init__(
        self, model: Model, data: ImageStore, learning_rate: float, memory_format: MemoryFormat = "contiguous"
    ) -> None:
        """Let a private copy of the module hand out gradients by client; `learning_rate` is the clients'.

        Raises:
            ConfigError: If a layer of the model cannot do that.
        """
        check_fusable(model)
        self.loop = LoopTrainer(model, data, learning_rate, memory_format)
        self.data, self.layout = data, model.layout
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        self.format = formats[memory_format]
        self.module = copy.deepcopy(model.module).train().to(memory_format=self.format)
        self._gradients: dict[str, Tensor] = {}
        for name, layer in self.module.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                by_client = partial(_ByClient.apply, layer, name, self._gradients, layer.weight)
                layer.forward = by_client  # type: ignore[method-assign]

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """See `LocalTrainer.train`; each client's schedule is one batch."""
        for parameter, value in zip(self.module.parameters(), self.layout.views(weights).values(), strict=True):
            parameter.data.copy_(value)
        pieces = list(_pieces([len(batch) for (batch,) in schedules]))
        found = LocalResult.join([self._pass(weights, [schedules[row] for row in rows]) for rows in pieces])
        order = np.concatenate(pieces)
        return found if (np.diff(order) > 0).all() else found.select(order.argsort())

    def _pass(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        if len(schedules) == 1:
            return self.loop.train(weights, schedules)
        updates, losses = self._step(np.stack([batch for (batch,) in schedules]), weights)
        return LocalResult(updates, losses, weights.new_empty(len(schedules), 0))

    def _step(self, batches: Indices, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients [k, d] and losses [k] of batches [k, B]."""
        images, labels = self.data.take(batches)
        gradients = weights.new_zeros(len(batches), len(weights))
        self._gradients.update(self.layout.views(gradients))
        logits = self.module(images.flatten(0, 1).contiguous(memory_format=self.format))
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels).mean(1)
        losses.sum().backward()
        return gradients, losses.detach()


def check_fusable(model: Model) -> None:
    """See that all parameters are those of linear layers and plain convolutions, each of one layer.

    Raises:
        ConfigError: If some are not.
    """
    able = {
        f"{name}.{kind}"
        for name, layer in model.module.named_modules()
        if type(layer) is nn.Linear
        or (type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str))
        for kind in ("weight", "bias")
        if getattr(layer, kind) is not None
    }
    others = [name for name in model.layout.names if name not in able] + sorted(able - set(model.layout.names))
    if others:
        raise ConfigError(f"runtime.execution: fused needs linear layers and plain convolutions, not {others[0]}")


def _pieces(sizes: list[int]) -> Iterator[list[int]]:
    """Yield rows whose batches have the same size, as many as go into a pass."""
    for size in sorted(set(sizes)):
        rows = [row for row, own in enumerate(sizes) if own == size]
        width = max(1, IMAGES // size)
        yield from (rows[at : at + width] for at in range(0, len(rows), width))


class _ByClient(torch.autograd.Function):
    """A linear layer or a convolution that adds each client's gradients to those kept under its name."""

    @staticmethod
    def forward(
        ctx: Any, layer: Any, name: str, gradients: dict[str, Tensor], weight: Tensor, x: Tensor
    ) -> Tensor:
        """Return the layer's output for the images of all clients; `weight` only makes autograd come back here."""
        ctx.layer, ctx.name, ctx.gradients = layer, name, gradients
        ctx.save_for_backward(x)
        result: Tensor = type(layer).forward(layer, x)
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        """Return the gradient by the input."""
        (slope,), (x,) = slopes, ctx.saved_tensors
        weight, bias = (ctx.gradients.get(f"{ctx.name}.{kind}") for kind in ("weight", "bias"))
        backward = _linear_backward if isinstance(ctx.layer, nn.Linear) else _convolution_backward
        return None, None, None, None, backward(ctx.layer, slope, x, weight, bias, ctx.needs_input_grad[4])


def _linear_backward(
    layer: nn.Linear, slope: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: bool
) -> Tensor | None:
    own = slope.reshape(len(weight), -1, layer.out_features)
    weight += own.mT @ x.reshape(len(weight), -1, layer.in_features)
    if bias is not None:
        bias += own.sum(1)
    return slope @ layer.weight if wanted else None


def _convolution_backward(
    layer: nn.Conv2d, slope: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: bool
) -> Tensor | None:
    def backward(slope: Tensor, x: Tensor, *mask: bool) -> Any:
        fixed = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
        return CONVOLUTION_BACKWARD(slope, x, layer.weight, [layer.out_channels], *fixed, mask)

    slope = slope.contiguous(memory_format=torch.channels_last)
    parts = zip(slope.tensor_split(len(weight)), x.tensor_split(len(weight)), strict=True)
    for client, (own, images) in enumerate(parts):
        _, by_weight, by_bias = backward(own, images, False, True, bias is not None)
        weight[client].add_(by_weight)
        if bias is not None:
            bias[client].add_(by_bias)
    return backward(slope, x, True, False, False)[0] if wanted else None
