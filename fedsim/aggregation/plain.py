"""Aggregation in the clear: the server sees every client's protected update."""

from torch import Tensor

from fedsim.aggregation.base import Aggregation


class PlainAggregation(Aggregation):
    """Weighted sums; the server reads each update as it was sent."""

    def partial(self, protected: Tensor, weights: Tensor) -> Tensor:
        """Return `weights` [K] times `protected` [K, d]: shape [d]."""
        return weights @ protected

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """Add two sums [d]."""
        return left + right

    def visible(self, protected: Tensor) -> Tensor:
        """Return the updates themselves."""
        return protected
