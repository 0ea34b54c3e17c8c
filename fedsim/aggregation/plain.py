"""Aggregation in the clear: the server sees every client's protected update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.aggregation.base import Aggregation


class PlainAggregation(Aggregation):
    """Weighted sums; the server reads each update as it was sent."""

    def partial(self, protected: Tensor, weights: Tensor) -> Tensor:
        """Return `weights` [K] times `protected` [K, d]: shape [d]."""
        return weights @ protected

    def combine(self, partials: Sequence[Tensor]) -> Tensor:
        """Add in the given order, in float64, so that the result does not depend on who finished first."""
        total = torch.zeros_like(partials[0], dtype=torch.float64)
        for partial in partials:
            total += partial
        return total.to(partials[0].dtype)

    def visible(self, protected: Tensor) -> Tensor:
        """Return the updates themselves."""
        return protected
