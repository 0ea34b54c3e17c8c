"""How many entries a prune fraction means, and where the threshold lies; shared by `gc` and `pld`."""

import math

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


def keep_largest(values: Tensor, lowest: int, out: Tensor) -> None:
    """Write each row of `values` to `out`, both [K, n], with zeros below its value of rank `lowest` in magnitude.

    Ranks count from 0, ascending; ties with that value are kept.
    """
    if values.device.type != "cpu":
        magnitudes = values.abs()
        torch.mul(values, magnitudes >= magnitudes.kthvalue(lowest + 1, dim=1, keepdim=True).values, out=out)
        return
    # NumPy's vectorised quickselect takes a fifth of the time of torch.kthvalue on a CPU, and its calls cost less.
    rows = values.detach().numpy()
    magnitudes_ = np.abs(rows)
    threshold = np.partition(magnitudes_, lowest, axis=1)[:, lowest : lowest + 1]
    with np.errstate(invalid="ignore"):  # infinite times zero is for whoever judges the update
        np.multiply(rows, magnitudes_ >= threshold, out=out.numpy())


def count_nonzero(rows: Tensor) -> Tensor:
    """Return how many entries of each row of `rows` [K, n] are not zero, shape [K]."""
    if rows.device.type != "cpu":
        return torch.count_nonzero(rows, dim=1)
    return torch.from_numpy(np.count_nonzero(rows.numpy(), axis=1))
