"""Elementwise activations: their derivatives, for `chain`, and their inverses, for `r_gap`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Activation(NamedTuple):
    """An elementwise f, with f′, f″/f′ and f⁻¹ as functions of a = f(z).

    The inverse is NaN where a does not tell z: outside the range of f, and where f is constant.
    """

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _within(a: Tensor, low: float, high: float) -> Tensor:
    return torch.where((a > low) & (a < high), a, torch.nan)


IDENTITY = Activation(lambda z: z, torch.ones_like, torch.zeros_like, lambda a: a)

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Identity: IDENTITY,
    nn.ReLU: Activation(
        torch.relu, lambda a: (a > 0).to(a.dtype), torch.zeros_like, lambda a: _within(a, 0, torch.inf)
    ),
    nn.Sigmoid: Activation(
        torch.sigmoid, lambda a: a - a * a, lambda a: 1 - 2 * a, lambda a: torch.logit(_within(a, 0, 1))
    ),
    nn.Tanh: Activation(
        torch.tanh, lambda a: 1 - a * a, lambda a: -2 * a, lambda a: torch.atanh(_within(a, -1, 1))
    ),
}


def activation_of(module: nn.Module) -> Activation | None:
    """Return the activation that a module is, or None if it is none of those known here."""
    if type(module) is nn.LeakyReLU and module.negative_slope > 0:
        return _leaky(module.negative_slope)
    return ACTIVATIONS.get(type(module))


def _leaky(share: float) -> Activation:
    return Activation(
        lambda z: F.leaky_relu(z, share),
        lambda a: torch.where(a > 0, torch.ones_like(a), share),
        torch.zeros_like,
        lambda a: torch.where(a > 0, a, a / share),
    )
