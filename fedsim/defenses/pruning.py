"""How many entries a prune fraction means, and where the threshold lies; shared by `gc` and `pld`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pruned_count(size: int, fraction: float) -> int:
    """Return how many of `size` distinct values lie strictly below their `fraction` quantile.

    This is the rule of the published codes, which compare with `numpy.percentile` (linear interpolation): at
    least one value always stays.
    """
    # The slack takes back what rounding may have put on top of a whole number.
    return math.ceil(fraction * (size - 1) * (1 - 1e-14))


def keep_largest(values: Tensor, sizes: Sequence[int], fraction: float) -> Tensor:
    """Return `values` [K, d] with zeros below the `fraction` quantile of magnitudes in each part; ties are kept.

    Args:
        values: One row a client.
        sizes: Entries of each part, in order; they sum to d.
        fraction: What `pruned_count` makes a rank in each part of.
    """
    if values.device.type != "cpu":
        parts = values.split(list(sizes), dim=1)
        return torch.cat([part * _is_large(part.abs(), fraction) for part in parts], dim=1)
    # NumPy's vectorised quickselect takes a fifth of the time of torch.kthvalue on a CPU, and its calls cost less.
    rows = values.detach().numpy()
    magnitudes, large, start = np.abs(rows), np.empty(rows.shape, np.bool_), 0
    for size in sizes:
        part, rank = magnitudes[:, start : start + size], pruned_count(size, fraction)
        threshold = np.partition(part, rank, axis=1)[:, rank : rank + 1]
        np.greater_equal(part, threshold, out=large[:, start : start + size])
        start += size
    with np.errstate(invalid="ignore"):  # infinite times zero is for whoever judges the update
        return torch.from_numpy(rows * large)


def _is_large(magnitudes: Tensor, fraction: float) -> Tensor:
    rank = pruned_count(magnitudes.shape[1], fraction)
    return magnitudes >= magnitudes.kthvalue(rank + 1, dim=1, keepdim=True).values


def count_nonzero(rows: Tensor) -> Tensor:
    """Return how many entries of each row of `rows` [K, n] are not zero, shape [K]."""
    if rows.device.type != "cpu":
        return torch.count_nonzero(rows, dim=1)
    # Row by row: along an axis NumPy counts a third as fast.
    return torch.tensor([np.count_nonzero(row != 0) for row in rows.numpy()])
