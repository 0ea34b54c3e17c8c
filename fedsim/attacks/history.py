"""The curvature pairs of batched L-BFGS, and the direction that they give."""

import torch
from torch import Tensor


class History:
    """The last h pairs (s, y) of each of M problems, and −H∇ computed from them.

    The inverse Hessian H is used in its compact form, so that a direction costs a few batched matrix products
    instead of 2h steps one after the other. The triangular matrix R, Rᵢⱼ = sᵢᵀyⱼ for sᵢ no younger than yⱼ, is
    kept as its inverse: a new pair appends a column, and dropping the oldest pair deletes its row and column,
    so the pairs may lie in a ring in any order and nothing is ever solved or sorted.

    Source: Byrd, Nocedal and Schnabel, "Representations of quasi-Newton matrices", Math. Programming 63, 1994.
    """

    def __init__(self, problems: int, dimension: int, length: int, like: Tensor) -> None:
        """Start empty, for `problems` vectors of `dimension`; dtype and device are those of `like`."""
        self.s = like.new_zeros(problems, length, dimension)
        self.y = like.new_zeros(problems, length, dimension)
        self.inverse = like.new_zeros(problems, length, length, dtype=torch.float64)
        self.gram = torch.zeros_like(self.inverse)
        self.curvature = like.new_zeros(problems, length, dtype=torch.float64)
        self.scale = like.new_ones(problems, dtype=torch.float64)
        self.count = like.new_zeros(problems, dtype=torch.long)
        self.used = 0

    def push(self, taken: Tensor, s: Tensor, y: Tensor) -> None:
        """Append pairs s, y [M, n] of the problems where `taken` [M], dropping the oldest of a full ring."""
        rows = taken.nonzero()[:, 0]
        at = self.count[rows] % self.s.shape[1]
        self.s[rows, at], self.y[rows, at] = s[rows], y[rows]
        self.inverse[rows, at] = 0
        self.inverse[rows, :, at] = 0
        self.count[rows] += 1
        self.used = min(self.used + 1, self.s.shape[1])
        used = self.used
        by_s, by_y = _products(self.s[:, :used], y)[rows], _products(self.y[:, :used], y)[rows]
        here = torch.arange(len(rows), device=rows.device)
        curvature = by_s[here, at]
        by_s[here, at] = 0
        column = -torch.einsum("mij,mj->mi", self.inverse[rows, :used, :used], by_s) / curvature[:, None]
        column[here, at] = 1 / curvature
        self.inverse[rows, :used, at] = column
        self.gram[rows, :used, at] = by_y
        self.gram[rows, at, :used] = by_y
        self.curvature[rows, at] = curvature
        self.scale[rows] = curvature / by_y[here, at]

    def direction(self, gradient: Tensor) -> Tensor:
        """Return −H∇ for gradients [M, n]; the steepest descent where there is no pair yet."""
        s, y = self.s[:, : self.used], self.y[:, : self.used]
        inverse, gram = self.inverse[:, : self.used, : self.used], self.gram[:, : self.used, : self.used]
        scale = self.scale[:, None]
        a = _product(inverse, _products(s, gradient))
        b = scale * (_products(y, gradient) - _product(gram, a)) - self.curvature[:, : self.used] * a
        c = _product(inverse.mT, b)
        return _combine(y, scale * a) + _combine(s, c) - scale.to(gradient) * gradient

    def forget(self, rows: Tensor) -> None:
        """Drop all pairs of problems `rows` [M], bool."""
        if not rows.any():
            return
        for tensor in (self.s, self.y, self.inverse, self.gram, self.curvature, self.count):
            tensor[rows] = 0
        self.scale[rows] = 1

    def select(self, rows: Tensor) -> None:
        """Keep only the problems `rows`, an index [k]."""
        for name in ("s", "y", "inverse", "gram", "curvature", "scale", "count"):
            setattr(self, name, getattr(self, name)[rows])


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    # As a row times the transpose: a batch of matrix times one column is an order of magnitude slower on CPUs.
    return torch.bmm(vector[:, None], matrix.mT)[:, 0]


def _products(vectors: Tensor, other: Tensor) -> Tensor:
    return _product(vectors, other).double()


def _combine(vectors: Tensor, coefficients: Tensor) -> Tensor:
    return torch.bmm(coefficients[:, None].to(vectors), vectors)[:, 0]
