"""The last layer of one image in closed form: its input and δ = ∂L/∂logits = p − y, from its gradient alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.attacks.chain import Entries
from fedsim.attacks.layer_systems import TINY, projected

GRID, ZOOMS = 65, 24
"""Points a zoom, and zooms, of the search for the length of the input; each narrows the interval 16 times."""

HALF_WIDTH = 12.0
"""Half the width of the first interval, in powers of e."""


class LastLayer(NamedTuple):
    """What the last layer's gradient tells.

    Attributes:
        input: The layer's input, shape [K].
        delta: ∂L/∂logits, shape [classes].
        rate: The factor by which gradients were multiplied before they were sent; 1 where it was known to be 1.
    """

    input: Tensor
    delta: Tensor
    rate: float


def last_layer(own: Entries, sent: Entries, known: bool) -> LastLayer:
    """Invert the last layer.

    With a bias the gradients are ∂L/∂b = δ and ∂L/∂W = δxᵀ: x is the projection of one on the other, whatever
    factor both were multiplied by; where that is not known, p − y at x tells it.
    Without one, ∂L/∂W = s·uvᵀ gives the directions of δ and x. Their lengths follow from δ = softmax(t·Wv) − y,
    x = t·v: t is where the two sides of s·u = t·(softmax(t·Wv) − y) come closest, over all classes together, in
    direction alone if s is known but for a factor.

    Args:
        own: The layer's weights, float64.
        sent: Its gradients, [1, …], float64.
        known: Whether the factor is known to be 1.
    """
    gradient = sent.weight[0]
    if sent.bias is not None and own.bias is not None:
        by_bias = sent.bias[0]
        x = projected(gradient, by_bias)
        delta = (own.weight[0] @ x + own.bias[0]).softmax(-1)
        delta[by_bias.argmin()] -= 1
        rate = 1.0 if known else float(by_bias @ delta / delta.square().sum())
        return LastLayer(x, by_bias if known else delta, rate)
    left, sizes, right = torch.linalg.svd(gradient, full_matrices=False)
    u, v, size = left[:, 0], right[0], sizes[0]
    # The true class has the largest entry of p − y, and the only negative one.
    label = u.abs().argmax()
    sign = -u[label].sign()
    u, v = sign * u, sign * v
    t = _length(own.weight[0] @ v, u, size, int(label), known)
    scaled = t * _deltas(t[None], own.weight[0] @ v, int(label))[0]
    rate = 1.0 if known else float(size * (scaled @ u) / scaled.square().sum())
    return LastLayer(t * v, scaled / t, rate)


def _deltas(t: Tensor, logits: Tensor, label: int) -> Tensor:
    """Return softmax(t·logits) − y for each of t [n], shape [n, classes]."""
    answers = (t[:, None] * logits).softmax(-1)
    answers[:, label] -= 1
    return answers


def _length(logits: Tensor, u: Tensor, size: Tensor, label: int, known: bool) -> Tensor:
    """Return the t > 0 at which t·(softmax(t·logits) − y) comes closest to size·u, by zooming in on log t."""
    steps = torch.linspace(-1, 1, GRID, dtype=u.dtype, device=u.device)
    centre, width = size.clamp_min(TINY).log(), u.new_tensor(HALF_WIDTH)
    for _ in range(ZOOMS):
        t = (centre + width * steps).exp()
        found = t[:, None] * _deltas(t, logits, label)
        if known:
            misfit = (found / size - u).square().sum(1)
        else:
            misfit = (found / found.norm(dim=1, keepdim=True).clamp_min(TINY) - u).square().sum(1)
        centre, width = t[misfit.argmin()].log(), width / 16
    return centre.exp()
