"""Where each parameter of a model lies in the flat vector that is sent and defended."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes and offsets of a model's parameters, in `model.parameters()` order.

    An update is a flat vector `[d]`; a batch of clients is a matrix `[K, d]`. All views share storage with
    the vector that they are taken from.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: nn.Module) -> "ParameterLayout":
        """Read the layout of `module`."""
        named = list(module.named_parameters())
        return cls(tuple(n for n, _ in named), tuple(tuple(p.shape) for _, p in named))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each parameter in the flat vector, and the end of the last: `len(names) + 1` numbers."""
        ends = [0]
        for size in self.sizes:
            ends.append(ends[-1] + size)
        return tuple(ends)

    @property
    def dimension(self) -> int:
        """Length d of the flat vector."""
        return self.offsets[-1]

    def span(self, name: str) -> slice:
        """Return the half-open range of parameter `name` in the flat vector; KeyError if there is none."""
        try:
            index = self.names.index(name)
        except ValueError:
            raise KeyError(f"no parameter {name!r}; there are {', '.join(self.names)}") from None
        return slice(self.offsets[index], self.offsets[index + 1])

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Split `vector` of shape [..., d] into named views of shape [..., *parameter shape]."""
        parts = vector.split(self.sizes, dim=-1)
        lead = vector.shape[:-1]
        return {n: p.reshape((*lead, *s)) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """Join parameter-shaped tensors, in layout order, into one vector of shape [d]."""
        return torch.cat([t.reshape(-1) for t in tensors])
