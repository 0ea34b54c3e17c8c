"""The linear equations that output, weight gradient and δ = ∂L/∂z of a convolution make for its input.

For a layer z = W∗x + b of one image two kinds of equations are linear in x: *weight constraints* W∗x = z − b, one
for each output that is known, and *gradient constraints* Σ_p δ[p, o]·x[patch p, k] = ∂L/∂W[o, k], one for each
weight.

Source: Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.chain import Entries, Layer

TINY = 1e-300
"""Least divisor."""

SWEEPS = 4
"""Sweeps of iterated Tikhonov regularisation: a direction that is determined 10 times better than the resolution
asks for is then solved to 1e-8."""


@dataclass(frozen=True)
class LayerSystem:
    """Equations matrix · x = values for the input x of one layer, channels last and flat.

    Attributes:
        matrix: Shape [equations, unknowns], float64; weight constraints first.
        values: Shape [equations].
        weight_constraints: How many of the equations are weight constraints.
    """

    matrix: Tensor
    values: Tensor
    weight_constraints: int

    def solve(self, start: Tensor, resolution: float) -> Tensor:
        """Return the least-squares solution [unknowns]; what the equations do not determine stays at `start`.

        Args:
            start: A guess, shape [unknowns].
            resolution: Share of the largest singular value below which a direction counts as not determined.

        Source: Tikhonov regularisation, iterated; King and Chillingworth, "Approximation of generalised inverses
        by iterated regularisation", 1979.
        """
        gram = self.matrix.mT @ self.matrix
        # The largest row sum bounds the largest eigenvalue from above.
        gram.diagonal().add_(resolution**2 * torch.linalg.matrix_norm(gram, torch.inf).clamp_min(TINY))
        factor, x = torch.linalg.cholesky(gram), start
        for _ in range(SWEEPS):
            residual = self.matrix.mT @ (self.values - self.matrix @ x)
            x = x + torch.cholesky_solve(residual[:, None], factor)[:, 0]
        return x

    def singular_values(self) -> Tensor:
        """Return the singular values in descending order, to about 1e-6 of the largest."""
        squares: Tensor = torch.linalg.eigvalsh(self.matrix.mT @ self.matrix)
        return squares.clamp_min(0).sqrt().flip(0)


def equations(layer: Layer) -> int:
    """Return the most equations that a convolution's system has."""
    return layer.cutter.output_shape[-1] * sum(_places(layer).shape)


def unknowns(layer: Layer) -> int:
    """Return the number of values in a layer's input."""
    return math.prod(layer.cutter.input_shape)


def projected(gradient: Tensor, delta: Tensor) -> Tensor:
    """Return the input [K] of a fully connected layer, whose gradient [O, K] is δxᵀ, given δ [O].

    These are gradient constraints for every input alone; weight constraints would add only what errors the layers
    behind have made.
    """
    return delta @ gradient / delta.square().sum().clamp_min(TINY)


def layer_system(layer: Layer, own: Entries, gradient: Tensor, delta: Tensor, z: Tensor) -> LayerSystem:
    """Set the equations for a convolution's input up, both kinds scaled to equal mean squares of their values.

    Args:
        layer: The convolution.
        own: Its weights, float64.
        gradient: ∂L/∂W in the order of `Entries.weight`, shape [O, K].
        delta: δ, shape [positions, O].
        z: What it put out before the activation, shape [positions, O]; NaN where that is not known.
    """
    places, size = _places(layer, delta.device), unknowns(layer)
    positions, taps, outputs = *places.shape, delta.shape[1]
    by_gradient = delta.new_zeros(outputs, taps, size + 1)
    index = places.mT[None].expand(outputs, taps, positions)
    by_gradient.scatter_add_(2, index, delta.mT[:, None].expand(outputs, taps, positions))
    by_weight = delta.new_zeros(positions, outputs, size + 1)
    index = places[:, None].expand(positions, outputs, taps)
    by_weight.scatter_add_(2, index, own.weight.expand(positions, outputs, taps))
    values = (z if own.bias is None else z - own.bias).flatten()
    known = values.isfinite()
    parts = [
        _scaled(by_weight[:, :, 1:].flatten(0, 1)[known], values[known]),
        _scaled(by_gradient[:, :, 1:].flatten(0, 1), gradient.flatten()),
    ]
    matrix, values = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return LayerSystem(matrix, values, int(known.sum()))


def _places(layer: Layer, device: torch.device | None = None) -> Tensor:
    """Return where in the flat input each tap of each position lies, [positions, taps]; 0: in the padding."""
    shape = layer.cutter.input_shape
    numbers = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).view(1, *shape)
    return layer.cutter.cut(numbers)[0].long().to(device)


def _scaled(matrix: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.square().mean().sqrt() if len(values) else values.new_ones(())
    scale = torch.where(scale > 0, scale, 1)
    return matrix / scale, values / scale
