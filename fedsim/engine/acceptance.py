"""Which updates count: each must have the model's size, and be finite."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import RunError


@dataclass(frozen=True)
class Accepted:
    """What K clients sent, judged.

    Attributes:
        rows: Updates and batch-norm statistics side by side, shape [K, d + b]; zero where an update was rejected.
        updates: The updates alone, shape [K, d]; zero where the size was wrong.
        mask: Whose updates count, bool, shape [K].
        reasons: By row: why an update was rejected.
    """

    rows: Tensor
    updates: Tensor
    mask: Tensor
    reasons: dict[int, str]


def judge(protected: Tensor | Sequence[Tensor], statistics: Tensor, dimension: int) -> Accepted:
    """Reject what is not finite or has another size than the model.

    Args:
        protected: What the clients sent: a matrix with a row a client, or one vector a client.
        statistics: Batch-norm statistics, shape [K, b].
        dimension: Size d of the model.

    Raises:
        RunError: If there is not one update a client.
    """
    updates, reasons = as_rows(protected, statistics, dimension)
    rows = torch.cat([updates, statistics], dim=1) if statistics.shape[1] else updates
    # No sum is finite of numbers that are not: one sum a client spares nearly every round the closer look.
    mask = rows.sum(dim=1).isfinite()
    if reasons or not bool(mask.all()):
        mask = rows.isfinite().all(dim=1)
        for row, finite in enumerate(mask.tolist()):
            if not finite:
                reasons.setdefault(row, "not finite")
        mask[list(reasons)] = False
        rows = torch.where(mask[:, None], rows, 0.0)
    return Accepted(rows, updates, mask, reasons)


def as_rows(protected: Tensor | Sequence[Tensor], like: Tensor, dimension: int) -> tuple[Tensor, dict[int, str]]:
    """Return updates as one matrix [K, d], and by row what is wrong with those of another size, which become zero.

    Args:
        protected: What the clients sent.
        like: A tensor with K rows, of the wanted type and device.
        dimension: Size d of the model.

    Raises:
        RunError: If there is not one update a client: then nobody knows whose is whose.
    """
    clients = len(like)
    if len(protected) != clients:
        raise RunError(f"defense: protect returned {len(protected)} updates for {clients} clients")
    if isinstance(protected, Tensor) and protected.shape == (clients, dimension):
        return protected, {}
    rows = like.new_zeros(clients, dimension)
    reasons = {}
    for number, update in enumerate(protected):
        if update.shape == (dimension,):
            rows[number] = update
        else:
            reasons[number] = f"shape {list(update.shape)} instead of [{dimension}]"
    return rows, reasons
