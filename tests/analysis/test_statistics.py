import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics import Estimate, clearly_best, mean_interval, proportion_interval

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


@settings(deadline=None)
@given(VALUES)
def test_one_seed_is_students_t(values: list[float]) -> None:
    found = mean_interval(values, [0] * len(values))
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    margin = stats.t(len(values) - 1).ppf(0.975) * error
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((found.value - margin, found.value + margin), abs=1e-9)


def test_balanced_seeds_are_students_t_over_their_means() -> None:
    groups = np.array([[5.0, 5.2, 5.1], [7.0, 7.3, 6.9], [9.1, 9.0, 9.2]])
    found = mean_interval(groups.ravel(), np.repeat([0, 1, 2], 3))
    means = groups.mean(axis=1)
    low, high = stats.t.interval(0.95, 2, loc=means.mean(), scale=stats.sem(means))
    assert (found.value, found.low, found.high) == pytest.approx((means.mean(), low, high))


def test_unbalanced_seeds_against_a_slow_reference() -> None:
    groups = [[1.0, 2.0], [5.0, 6.0, 7.5, 5.5], [9.0]]
    everything = [value for group in groups for value in group]
    mean = sum(everything) / len(everything)
    variance = 0.0
    for group in groups:
        variance += sum(value - mean for value in group) ** 2
    error = math.sqrt(variance * 3 / 2) / len(everything)
    found = mean_interval(everything, [0, 0, 1, 1, 1, 1, 2])
    assert found.margin == pytest.approx(stats.t(2).ppf(0.975) * error)


@settings(deadline=None)
@given(VALUES)
def test_several_seeds_never_make_the_interval_narrower(values: list[float]) -> None:
    together = mean_interval(values, [0] * len(values))
    split = mean_interval(values, [index % 2 for index in range(len(values))])
    assert split.margin >= together.margin


def test_the_interval_covers_the_truth_where_pooling_seeds_does_not() -> None:
    rng = np.random.default_rng(0)
    seeds = np.repeat(np.arange(3), 20)
    covered = {"clustered": 0, "pooled": 0}
    for _ in range(400):
        values = rng.normal(size=3)[seeds] + rng.normal(size=60)
        for name, clusters in (("clustered", seeds), ("pooled", np.zeros(60))):
            found = mean_interval(values, clusters)
            covered[name] += found.low <= 0 <= found.high
    assert covered["clustered"] / 400 > 0.93
    assert covered["pooled"] / 400 < 0.75


def test_a_single_value_has_no_interval() -> None:
    found = mean_interval([3.0], [0])
    assert found.value == 3.0
    assert not found.has_interval


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="no value"):
        mean_interval([], [])


def test_proportion_is_wilsons_closed_form() -> None:
    share, trials, z = 0.9, 360, stats.norm.ppf(0.975)
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    found = proportion_interval(share, trials)
    assert (found.value, found.low, found.high) == pytest.approx((share, centre - half, centre + half))


def around(value: float, margin: float = 1.0) -> Estimate:
    return Estimate(value, value - margin, value + margin)


def test_winners_are_the_best_and_what_overlaps_it() -> None:
    candidates = {"a": around(5), "b": around(6.5), "c": around(9)}
    assert clearly_best(candidates) == {"a", "b"}
    assert clearly_best(candidates, lower_is_better=False) == {"c"}


def test_nobody_wins_where_all_overlap() -> None:
    assert clearly_best({"a": around(5), "b": around(6), "c": around(6.5)}) == set()


def test_below_the_floor_all_are_equal() -> None:
    candidates = {"a": around(3), "b": around(9), "c": around(20)}
    assert clearly_best(candidates) == {"a"}
    assert clearly_best(candidates, floor=12) == {"a", "b"}
    assert clearly_best({"a": around(3), "b": around(9)}, floor=12) == set()


def test_barred_candidates_lose_but_never_win() -> None:
    candidates = {"a": around(3), "b": around(9), "c": around(20)}
    assert clearly_best(candidates, barred={"a"}) == {"b"}
    assert clearly_best(candidates, barred={"c"}) == {"a"}
    assert clearly_best(candidates, barred={"a", "b", "c"}) == set()


def test_without_an_interval_nothing_is_claimed() -> None:
    assert clearly_best({"a": Estimate(1.0), "b": around(9)}) == set()
    assert clearly_best({}) == set()
