"""Convolutions whose derivatives, of any order, are the three products that libraries are fast at.

A convolution y = x ∗ w, its input gradient and its weight gradient are the three partial derivatives of one
trilinear form ⟨g, x ∗ w⟩. Each of them is linear in two of g, x and w, so that its own derivatives are again the
other two. PyTorch's own second derivative instead correlates whole images with each other as if one were the
kernel, at half the speed where each problem has weights' directions of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Geometry(NamedTuple):
    """Stride, padding and dilation by dimension, and the number of groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _backward(g: Tensor, x: Tensor, w: Tensor, how: Geometry, of_input: bool) -> Tensor:
    mask, none = [of_input, not of_input, False], [0] * len(how.stride)
    stride, padding, dilation, groups = how
    gradients = torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, none, groups, mask
    )
    found: Tensor = gradients[0 if of_input else 1]
    return found


class _Product(Function):
    """One of the three products; subclasses say which, and `backward` which are its derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the factors."""
        ctx.save_for_backward(*inputs[:2])
        ctx.rest = inputs[2:]


class Convolution(_Product):
    """y = x ∗ w of x [N, C, H, W] and w [O, C/groups, k, k]."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, how: Geometry) -> Tensor:
        """Convolve."""
        stride, padding, dilation, groups = how
        found: Tensor = torch.ops.aten.convolution(
            x, w, None, stride, padding, dilation, False, [0] * len(stride), groups
        )
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Both gradients, where they are asked for."""
        (x, w), (how,) = ctx.saved_tensors, ctx.rest
        by_x = InputGradient.apply(g, w, x.shape, how) if ctx.needs_input_grad[0] else None
        by_w = WeightGradient.apply(g, x, w.shape, how) if ctx.needs_input_grad[1] else None
        return by_x, by_w, None


class InputGradient(_Product):
    """∂⟨g, x ∗ w⟩/∂x of g [N, O, H′, W′] and w, for an x of a given shape."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, shape: torch.Size, how: Geometry) -> Tensor:
        """Convolve back."""
        return _backward(g, g.new_empty(1).expand(shape), w, how, of_input=True)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """As if x were the input whose convolution meets g."""
        (g, w), (_, how) = ctx.saved_tensors, ctx.rest
        by_g = Convolution.apply(x, w, how) if ctx.needs_input_grad[0] else None
        by_w = WeightGradient.apply(g, x, w.shape, how) if ctx.needs_input_grad[1] else None
        return by_g, by_w, None, None


class WeightGradient(_Product):
    """∂⟨g, x ∗ w⟩/∂w of g and x, for a w of a given shape."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, shape: torch.Size, how: Geometry) -> Tensor:
        """Correlate."""
        return _backward(g, x, g.new_empty(1).expand(shape), how, of_input=False)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """As if w were the kernel that x is convolved with before it meets g."""
        (g, x), (_, how) = ctx.saved_tensors, ctx.rest
        by_g = Convolution.apply(x, w, how) if ctx.needs_input_grad[0] else None
        by_x = InputGradient.apply(g, w, x.shape, how) if ctx.needs_input_grad[1] else None
        return by_g, by_x, None, None


class FastConvolutions(TorchFunctionMode):
    """Within it every two-dimensional convolution with numeric padding is a `Convolution`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace one call."""
        if func is not F.conv2d:
            return func(*args, **(kwargs or {}))
        return _convolve(*args, **(kwargs or {}))


def _convolve(
    input: Tensor,  # noqa: A002 - PyTorch's name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    how = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    found: Tensor = Convolution.apply(input, weight, how)
    return found if bias is None else found + bias[:, None, None]


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
