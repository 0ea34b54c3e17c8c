"""One local step of all clients of a chunk in one pass: their weights are the same, so only gradients differ.

The images of all clients run through each layer as one batch, forward and backward; only where a layer has
parameters does the backward pass take each client's part of the batch by itself, for that client's own gradient.

Sources: Goodfellow, "Efficient per-example gradient computations", 2015; here with a client for an example. Shi
et al., "Is the deconvolution layer the same as a convolutional layer?", 2016.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore, Indices
from fedsim.learning.models import Model
from fedsim.learning.training import LocalResult, LoopTrainer, MemoryFormat

IMAGES = 512
"""Images in a pass, unless one client has more: a pass has its price, activations take memory."""


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
        self.layers: dict[str, _Layer] = {}
        for name, layer in self.module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                self.layers[name] = _Linear(layer) if isinstance(layer, nn.Linear) else _Convolution(layer)
                layer.forward = self.layers[name].forward  # type: ignore[assignment, method-assign]

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """See `LocalTrainer.train`; each client's schedule is one batch."""
        for parameter, value in zip(self.module.parameters(), self.layout.views(weights).values(), strict=True):
            parameter.data.copy_(value)
        for layer in self.layers.values():
            layer.filters = None
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
        views = self.layout.views(gradients)
        for name, layer in self.layers.items():
            layer.weight, layer.bias = views[f"{name}.weight"], views.get(f"{name}.bias")
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


def _pieces(sizes: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield rows whose batches have the same size, in equal parts of no more than go into a pass."""
    for size in sorted(set(sizes)):
        rows = tuple(row for row, own in enumerate(sizes) if own == size)
        passes = -(-len(rows) // max(1, IMAGES // size))
        yield from (rows[len(rows) * at // passes : len(rows) * (at + 1) // passes] for at in range(passes))


class _ByClient(torch.autograd.Function):
    """The output of a layer for the images of all clients; on the way back it collects their gradients."""

    @staticmethod
    def forward(ctx: Any, layer: "_Layer", weight: Tensor, x: Tensor) -> Tensor:
        """Return the output; `weight` is there so that autograd comes back also if the input needs no gradient."""
        ctx.layer = layer
        ctx.save_for_backward(x)
        output: Tensor = layer.plain(x)
        return output

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        """Return the gradient by the input."""
        (slope,), (x,) = slopes, ctx.saved_tensors
        return None, None, ctx.layer.backward(slope, x, wanted=ctx.needs_input_grad[2])


class _Layer(ABC):
    """A layer whose gradients are added up by client.

    Attributes:
        weight: Gradients by the weights of K clients, shape [K, ...].
        bias: Gradients by the biases, shape [K, O]; None where the layer has none.
        filters: What it made of its weights for the way back; None when these are new.
    """

    weight: Tensor
    bias: Tensor | None
    filters: Tensor | None

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.plain = layer.forward

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for the images of all clients; differentiable."""
        output: Tensor = _ByClient.apply(self, self.layer.weight, x)
        return output

    @abstractmethod
    def backward(self, slope: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
        """Add to the clients' gradients; return the gradient by the input if it is wanted."""


class _Linear(_Layer):
    """A linear layer."""

    def backward(self, slope: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
        own = slope.reshape(len(self.weight), -1, self.layer.out_features)
        self.weight.baddbmm_(own.mT, x.reshape(len(self.weight), -1, self.layer.in_features))
        if self.bias is not None:
            self.bias += own.sum(1)
        return slope @ self.layer.weight if wanted else None


class _Convolution(_Layer):
    """A convolution."""

    def backward(self, slope: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
        slope = slope.contiguous(memory_format=torch.channels_last)
        clients = len(self.weight)
        for weight, own, images in zip(self.weight, slope.chunk(clients), x.chunk(clients), strict=True):
            weight += self._gradient(own, images, by="weight")
        if self.bias is not None:
            self.bias += slope.permute(0, 2, 3, 1).reshape(clients, -1, self.layer.out_channels).sum(1)
        return self._by_input(slope, x) if wanted else None

    def _by_input(self, slope: Tensor, x: Tensor) -> Tensor:
        stride, reach = self.layer.stride[0], sub_pixel_reach(self.layer)
        if reach is None or x.shape[2:] != torch.Size(stride * extent for extent in slope.shape[2:]):
            return self._gradient(slope, x, by="input")
        if self.filters is None:
            self.filters = sub_pixel_filters(self.layer.weight.detach(), stride, self.layer.padding[0], reach)
        return shuffle_pixels(F.conv2d(slope, self.filters, padding=reach), stride)

    def _gradient(self, slope: Tensor, x: Tensor, by: Literal["input", "weight"]) -> Tensor:
        layer = self.layer
        fixed = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
        mask = (by == "input", by == "weight", False)
        found = torch.ops.aten.convolution_backward.default(slope, x, layer.weight, None, *fixed, mask)
        gradient: Tensor = found[0 if by == "input" else 1]
        return gradient


def sub_pixel_reach(layer: nn.Conv2d) -> int | None:
    """Return how many outputs to each side an input touches; None where sides differ or it is not that simple."""
    stride, size, padding = layer.stride[0], layer.kernel_size[0], int(layer.padding[0])
    square = (layer.stride, layer.kernel_size, layer.padding) == tuple((n, n) for n in (stride, size, padding))
    if not square or layer.groups != 1 or layer.dilation != (1, 1):
        return None
    before, after = (stride - 1 + padding) // stride, (size - 1 - padding) // stride
    return after if before == after else None


def sub_pixel_filters(weight: Tensor, stride: int, padding: int, reach: int) -> Tensor:
    """Return the filters of a convolution without stride whose shuffled pixels are a gradient by the input.

    That of an input at s·u + r, r < s, is a sum over outputs from u − reach to u + reach: for each r a convolution
    of its own, which reads the weights s apart. One kernel for all of them is faster than a strided one backwards.

    Args:
        weight: Filters of the convolution with stride s, shape [O, I, k, k].
        stride: Its s.
        padding: Its padding.
        reach: See `sub_pixel_reach`.

    Returns:
        Filters of shape [s · s · I, O, 2 · reach + 1, 2 · reach + 1], channels-last, for a padding of `reach`.
    """
    outputs, inputs, size, _ = weight.shape
    taps = 2 * reach + 1
    first = reach * stride - padding
    last = taps * stride - size - first
    spread = F.pad(weight, (first, last, first, last)).view(outputs, inputs, taps, stride, taps, stride)
    filters = spread.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(-1, outputs, taps, taps)
    return filters.contiguous(memory_format=torch.channels_last)


def shuffle_pixels(images: Tensor, stride: int) -> Tensor:
    """Spread the channels of each pixel over stride² pixels: [N, s · s · C, H, W] → [N, C, s · H, s · W].

    PyTorch's `pixel_shuffle` wants the channels in the order [C, s, s]. In this one those of a pixel stay side by
    side in channels-last images: longer pieces are copied.
    """
    if stride == 1:
        return images
    count, channels, height, width = images.shape
    own = channels // stride**2
    parts = images.permute(0, 2, 3, 1).reshape(count, height, width, stride, stride * own)
    pixels = parts.transpose(2, 3).reshape(count, stride * height, stride * width, own)
    return pixels.permute(0, 3, 1, 2)
