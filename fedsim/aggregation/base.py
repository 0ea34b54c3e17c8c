"""The seam between what clients send, how it is added, and what the server sees of one client.

Secure aggregation and homomorphic encryption fit here: they change all three, and nothing else.
"""

from torch import Tensor


class Aggregation:
    """How the protected updates of a round become one weighted sum."""

    def partial(self, protected: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum [d] of a chunk's protected updates [K, d]; runs where the updates are."""
        raise NotImplementedError

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the sum [d] of two such sums; runs on workers and on the server."""
        raise NotImplementedError

    def visible(self, protected: Tensor) -> Tensor:
        """Return what the server sees of single clients, given their protected updates [N, d]."""
        raise NotImplementedError
