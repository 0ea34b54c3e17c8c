"""Means and 95 % intervals, and when a difference between them means something."""

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and the interval around it; both ends are NaN where nothing is known of the spread."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def has_interval(self) -> bool:
        """Whether the spread is known."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def margin(self) -> float:
        """The larger distance from the value to an end of the interval."""
        return max(self.high - self.value, self.value - self.low)

    def scaled(self, factor: float) -> "Estimate":
        """Return the estimate in another unit."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def raised_to(self, floor: float) -> "Estimate":
        """Return the estimate with all that lies below `floor` moved up to it."""
        ends = (self.value, self.low, self.high)
        return Estimate(*(end if math.isnan(end) else max(end, floor) for end in ends))


def mean_interval(values: Iterable[float], clusters: Iterable[object]) -> Estimate:
    """Return the mean and its 95 % interval.

    With one cluster (seed) this is Student's t over the values. With several, values of one seed share weights,
    noise and partition, so the standard error is cluster-robust and t has (seeds − 1) degrees of freedom. Few
    seeds can lie close by luck: the interval is never narrower than if all values were independent.

    Args:
        values: Finite numbers, one an image (or one a seed).
        clusters: The seed of each value.

    Raises:
        ValueError: If there is no value.

    Source:
        Liang and Zeger, Biometrika 73(1), 1986 (cluster-robust variance of a mean).
    """
    data, groups = np.asarray(list(values), dtype=float), np.asarray(list(clusters))
    if not len(data):
        raise ValueError("no value to average")
    mean = float(data.mean())
    margin = _t_margin(data, np.arange(len(data)))
    if len(np.unique(groups)) > 1:
        margin = max(margin, _t_margin(data, np.unique(groups, return_inverse=True)[1]))
    return Estimate(mean, mean - margin, mean + margin)


def _t_margin(data: np.ndarray, groups: np.ndarray) -> float:
    count = int(groups.max()) + 1
    if count < 2:
        return math.nan
    deviations = np.bincount(groups, weights=data - data.mean())
    error = math.sqrt(count / (count - 1) * float(np.sum(deviations**2))) / len(data)
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error


def proportion_interval(share: float, trials: int) -> Estimate:
    """Return Wilson's 95 % interval of a share of `trials`, such as the accuracy on a test set."""
    interval = stats.binomtest(round(share * trials), trials).proportion_ci(LEVEL, method="wilson")
    return Estimate(share, float(interval.low), float(interval.high))


def clearly_best(
    candidates: Mapping[str, Estimate],
    barred: AbstractSet[str] = frozenset(),
    lower_is_better: bool = True,
    floor: float = -math.inf,
) -> set[str]:
    """Return the best candidate and all that cannot be told from it, if another is clearly worse.

    Two candidates differ if their intervals do not overlap. What lies below `floor` counts as the floor: there is
    no credit for a reconstruction that is worse than a blind guess.

    Args:
        candidates: Estimates; one without an interval can neither win nor lose.
        barred: Candidates that may lose but never win.
        lower_is_better: Which way is better.
        floor: Lowest value that means anything (only where lower is better).

    Returns:
        Names of the winners; empty where no difference is meaningful.
    """
    sign = 1 if lower_is_better else -1
    known = {name: e.raised_to(floor) for name, e in candidates.items() if e.has_interval}
    ends = {name: sorted((sign * e.low, sign * e.high)) for name, e in known.items()}
    free = [name for name in known if name not in barred]
    if not free:
        return set()
    bound = ends[min(free, key=lambda name: sign * known[name].value)][1]
    if all(low <= bound for low, _ in ends.values()):
        return set()
    return {name for name in free if ends[name][0] <= bound}
