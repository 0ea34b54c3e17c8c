"""The sum of a round's chunks in a fixed binary tree, whoever adds which part of it.

Chunk i of n is leaf i. Neighbours are added in pairs, then these sums in pairs, and so on; one without a neighbour
moves up as it is. So a worker can add what it has trained itself, and the bits depend on n alone. The error grows
with log₂ n.

Source: Higham, "The accuracy of floating point summation", SIAM J. Sci. Comput. 14(4), 1993: pairwise summation.
"""

from typing import NamedTuple

from torch import Tensor

from fedsim.aggregation.base import Aggregation


def power_of_two(most: int) -> int:
    """Return the largest power of two up to `most`, at least 1."""
    return 1 << max(0, most.bit_length() - 1)


class Block(NamedTuple):
    """A node of the tree: the chunks `start` … `start + size` − 1, as far as they exist.

    Attributes:
        start: A multiple of `size`.
        size: A power of two.
    """

    start: int
    size: int


class PairwiseSum:
    """Adds sums of blocks, which must come in order and leave no gap."""

    def __init__(self, aggregation: Aggregation) -> None:
        """Add two sums as `aggregation` does."""
        self._add = aggregation.add
        self._open: list[tuple[Block, Tensor]] = []

    def push(self, block: Block, value: Tensor) -> None:
        """Put the next block's sum [d] on, adding what has become a pair."""
        self._open.append((block, value))
        while len(self._open) > 1:
            (left, a), (right, b) = self._open[-2:]
            if left.size != right.size or left.start % (2 * left.size):
                return
            self._open[-2:] = [(Block(left.start, 2 * left.size), self._add(a, b))]

    def total(self) -> Tensor:
        """Return the sum [d] of all that was pushed."""
        values = [value for _, value in self._open]
        total = values.pop()
        while values:
            total = self._add(values.pop(), total)
        return total
