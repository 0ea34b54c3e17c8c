"""How the chunks of a round are dealt to workers: in large blocks first, in small ones at the end."""

from itertools import pairwise

from fedsim.aggregation.pairwise import Block, power_of_two

MOST = 16
"""Chunks a block, at most: what a dying worker can take with it."""
IN_FLIGHT = 2
"""Blocks dealt to a worker at a time, so that the next one is there when it ends one."""
LEAST_CLIENTS = 16
"""Clients a worker up to which its share is not split further: a call costs half a client's time or more."""


def split_evenly(clients: tuple[int, ...], width: int) -> list[tuple[int, ...]]:
    """Split a cohort into `chunk_count` chunks whose sizes differ by one at most."""
    count = chunk_count(len(clients), width)
    bounds = [number * len(clients) // count for number in range(count + 1)]
    return [clients[start:stop] for start, stop in pairwise(bounds)]


def chunk_count(clients: int, width: int) -> int:
    """Return how many chunks of at most `width` clients a cohort is: a power of two, where it has so many clients.

    Neighbours in the tree then have equally many clients, but for one, so that workers get even shares.
    """
    least = -(-clients // width)
    return min(clients, 2 * power_of_two(least - 1) if least > 1 else 1)


def call_count(chunks: int, width: int, workers: int) -> int:
    """Return in how many blocks a `Dealer` deals so many chunks when no worker is lost."""
    dealer = Dealer(chunks, width)
    return sum(1 for _ in iter(lambda: dealer.next(workers), None))


class Dealer:
    """Deals the numbers 0 … n − 1 in blocks that are nodes of a binary tree, to whoever is free.

    In turns, each worker gets half of an even share of what is left, so that few calls are made and workers end
    together whatever their speed. Which worker gets what cannot change a result.

    Source: Hummel, Schonberg, Flynn, "Factoring: a method for scheduling parallel loops", Comm. ACM 35(8), 1992.
    """

    def __init__(self, count: int, width: int = 1, most: int = MOST) -> None:
        """Deal `count` chunks of `width` clients, at most `most` at a time."""
        self._count, self._dealt, self._most = count, 0, most
        self._enough = max(1, LEAST_CLIENTS // width)
        self._size, self._turns = 1, 0

    @property
    def left(self) -> int:
        """How many have not been dealt."""
        return self._count - self._dealt

    def next(self, workers: int) -> Block | None:
        """Return the next block, given how many workers there are; None when all are dealt."""
        if not self.left:
            return None
        if not self._turns:
            share = self.left // workers
            self._size = power_of_two(min(self._most, share if share <= self._enough else share // 2))
            self._turns = workers
        self._turns -= 1
        # A node starts at a multiple of its size; sizes could grow when a worker is lost.
        size = min(self._size, self._dealt & -self._dealt or self._size)
        block = Block(self._dealt, size)
        self._dealt = min(self._count, self._dealt + size)
        return block

    def numbers(self, block: Block) -> range:
        """Return the numbers in a block; the last ones of the tree may have less than their size."""
        return range(block.start, min(self._count, block.start + block.size))
