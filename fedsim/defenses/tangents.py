"""Push many random directions through a network at once, faster than `vmap` of `torch.func.jvp`.

PyTorch's forward mode convolves the input with a zero tangent of the weights at each layer, and repeats the
first layer's tangents for every client though the directions are shared. Here convolutions, linear layers and
the usual activations have rules of their own, which takes a third off a LeNet's time; anything else falls back
on `torch.func`, operation by operation.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

ImageFunction = Callable[[Tensor], Tensor]

LINEAR_MAPS = {F.conv1d, F.conv2d, F.conv3d, F.linear}

SLOPES: dict[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]] = {
    torch.sigmoid: lambda x, y: y * (1 - y),
    torch.tanh: lambda x, y: 1 - y * y,
    torch.relu: lambda x, y: (x > 0).to(y),
    F.relu: lambda x, y: (x > 0).to(y),
}
"""Derivative of an activation from its input x and output y."""


class Unsupported(Exception):
    """An operation that cannot carry tangents along; `torch.func` must do the whole function."""


def push_forward(function: ImageFunction, images: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values and the directional derivatives of a function that treats images one by one.

    Args:
        function: Maps images [N, C, H, W] to [N, features].
        images: Batches of k clients, shape [k, B, C, H, W].
        directions: Shape [P, B, C, H, W]; every client's batch moves along the same.

    Returns:
        Values [k, B, features] and derivatives [P, k, B, features].

    Raises:
        Unsupported: If the function works in place or returns several tensors somewhere.
    """
    result = function(Dual(images.flatten(0, 1).clone(), directions))
    if not isinstance(result, Dual):
        raise Unsupported("the result does not depend on the images")
    clients = images.shape[:2]
    values, tangents = result.primal, result.for_each_row()
    return values.reshape(*clients, -1), tangents.reshape(len(directions), *clients, -1)


def client_by_client(function: ImageFunction, images: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """As `push_forward`, for any function of one client's batch [B, C, H, W], by `torch.func` alone."""

    def client(images: Tensor) -> tuple[Tensor, Tensor]:
        def push(direction: Tensor) -> tuple[Tensor, Tensor]:
            pair = jvp(function, (images,), (direction,))
            return pair[0], pair[1]

        # The values do not depend on the direction: the first row is like all others.
        values, tangents = vmap(push)(directions)
        return values[0], tangents

    result: tuple[Tensor, Tensor] = vmap(client, out_dims=(0, 1))(images)
    return result


class Dual(Tensor):
    """A tensor [N, ...] that takes P tangents along through every operation.

    Attributes:
        primal: The plain tensor, shape [N, ...].
        tangents: Shape [P, M, ...]; M is N, or the size of one client's batch while all clients share them.
    """

    primal: Tensor
    tangents: Tensor

    @staticmethod
    def __new__(cls, primal: Tensor, tangents: Tensor) -> "Dual":
        """Look like `primal` to whoever asks for shape, type or device."""
        dual: Dual = Tensor._make_subclass(cls, primal)
        dual.primal, dual.tangents = primal, tangents
        return dual

    def for_each_row(self) -> Tensor:
        """Return the tangents with one row for each row of the primal, shape [P, N, ...]."""
        repeats = self.primal.shape[0] // self.tangents.shape[1]
        return self.tangents.repeat(1, repeats, *[1] * (self.tangents.dim() - 2)) if repeats > 1 else self.tangents

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply `func` to primals and tangents."""
        with torch._C.DisableTorchFunctionSubclass():
            leaves, structure = tree_flatten((args, kwargs or {}))

            def call(leaves: list[Any]) -> Any:
                args, kwargs = tree_unflatten(leaves, structure)
                return func(*args, **kwargs)

            duals = [leaf for leaf in leaves if isinstance(leaf, Dual)]
            versions = [dual.primal._version for dual in duals]
            value = call([leaf.primal if isinstance(leaf, Dual) else leaf for leaf in leaves])
            if versions != [dual.primal._version for dual in duals]:
                raise Unsupported(f"{func} works in place")
            if not isinstance(value, Tensor):
                if any(isinstance(part, Tensor) for part in tree_flatten(value)[0]):
                    raise Unsupported(f"{func} returns several tensors")
                return value
            if not value.is_floating_point():
                return value  # masks and indices have no derivative
            only = len(duals) == 1 and args[0] is duals[0]
            if only and func in LINEAR_MAPS:
                tangents = _linear_map(func, args, kwargs or {})
            elif only and func in SLOPES:
                tangents = _scaled(args[0].tangents, SLOPES[func](args[0].primal, value))
            else:
                tangents = _generic(call, leaves)
            return cls(value, tangents)


def _linear_map(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Apply a convolution or linear layer, without its bias, to all tangents as one batch."""
    tangents = args[0].tangents
    rest = [None if position == 2 else arg for position, arg in enumerate(args)][1:]
    result: Tensor = func(tangents.flatten(0, 1), *rest, **{k: v for k, v in kwargs.items() if k != "bias"})
    return result.view(*tangents.shape[:2], *result.shape[1:])


def _scaled(tangents: Tensor, slope: Tensor) -> Tensor:
    """Multiply tangents [P, M, ...] by the slope [N, ...] of an activation."""
    by_client = slope.reshape(-1, *tangents.shape[1:])
    return (tangents[:, None] * by_client).flatten(1, 2)


def _generic(call: Callable[[list[Any]], Any], leaves: list[Any]) -> Tensor:
    """Leave the operation to `torch.func`."""
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Dual)]

    def function(*primals: Tensor) -> Tensor:
        filled = list(leaves)
        for index, primal in zip(places, primals, strict=True):
            filled[index] = primal
        result: Tensor = call(filled)
        return result

    primals = tuple(leaves[index].primal for index in places)
    tangents = tuple(leaves[index].for_each_row() for index in places)
    result: Tensor = vmap(lambda *directions: jvp(function, primals, directions)[1])(*tangents)
    return result
