"""What a defense costs: round time with it over round time without it."""

import statistics
from dataclasses import dataclass
from itertools import count, islice

from fedsim.engine.federation import Federation


@dataclass(frozen=True)
class Overhead:
    """Round time with a defense over without, from paired rounds.

    Attributes:
        pairs: Number of pairs.
        median: Median of (with / without − 1).
        low: Lower quartile.
        high: Upper quartile.
    """

    pairs: int
    median: float
    low: float
    high: float


def measure_overhead(plain: Federation, defended: Federation, first_round: int, pairs: int) -> Overhead:
    """Time rounds with and without a defense in turn on the same workers, because clocks drift.

    The first pair warms up and does not count; which of the two goes first alternates. A round for which too few
    clients report back is passed over.
    """
    numbers = (number for number in count(first_round) if plain.has_quorum(number))
    ratios = []
    for pair, number in enumerate(islice(numbers, pairs + 1)):
        order = (plain, defended) if pair % 2 else (defended, plain)
        seconds = {id(one): one.run_round(number).seconds for one in order}
        ratios.append(seconds[id(defended)] / seconds[id(plain)] - 1)
    low, median, high = statistics.quantiles(ratios[1:], n=4) if pairs > 1 else ratios[1:] * 3
    return Overhead(pairs, median, low, high)
