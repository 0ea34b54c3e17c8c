"""Clipping to an L2 norm, of rows and of slices of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor


def clipped(rows: Tensor, norm: float) -> Tensor:
    """Scale each row of `rows` [..., d] that is longer than `norm` down to it.

    Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, Algorithm 1.
    """
    return rows * _factor(rows, norm)


def clip_slices_(rows: Tensor, slices: Sequence[slice], selected: Tensor, norm: float) -> Tensor:
    """Clip the selected slices of each row to `norm`, in place and one slice after the other.

    Slices that share an entry therefore see what the ones before them left of it.

    Args:
        rows: Per-sample gradients, shape [k, B, d]; overwritten.
        slices: n ranges of entries.
        selected: Which slices each client perturbs, shape [k, n], bool.
        norm: L2 norm that no selected slice exceeds afterwards, in gradient units.

    Returns:
        `rows`.
    """
    for part, chosen in zip((rows[..., s] for s in slices), selected.T, strict=True):
        part.mul_(torch.where(chosen[:, None, None], _factor(part, norm), 1.0))
    return rows


def _factor(rows: Tensor, norm: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm / length.clamp(min=norm)
