import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import ConfigError
from fedsim.sweep.space import MOST_POINTS, Choice, Interval, Space, lay, parse_axis

numbers = st.floats(1e-6, 1e6)


@given(numbers, numbers, st.integers(0, 2**32), st.booleans())
def test_draws_lie_between_the_ends(one: float, other: float, seed: int, log: bool) -> None:
    low, high = sorted((one, other))
    drawn = Interval(low, high, log).sample(np.random.default_rng(seed))
    assert low * (1 - 1e-9) <= drawn <= high * (1 + 1e-9)


def test_a_logarithmic_interval_has_its_median_at_the_geometric_mean() -> None:
    rng, axis = np.random.default_rng(0), Interval(1e-4, 1.0, log=True)
    draws = [axis.sample(rng) for _ in range(2000)]
    assert math.log10(float(np.median(draws))) == pytest.approx(-2, abs=0.1)


@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 7), st.integers(0, 2**32))
def test_steps_are_whole_multiples_above_the_low_end(low: int, width: int, step: int, seed: int) -> None:
    axis = Interval(low, low + width, step=step)
    drawn = axis.sample(np.random.default_rng(seed))
    assert isinstance(drawn, int) and (drawn - low) % step == 0 and low <= drawn <= low + width
    assert axis.corners()[0] == low and low + width - step < axis.corners()[1] <= low + width


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ({"grid": [1, 2]}, Choice((1, 2), grid=True)),
        ({"choice": ["a"]}, Choice(("a",))),
        ({"uniform": [0, 1]}, Interval(0, 1)),
        ({"loguniform": ["1e-4", 10]}, Interval(1e-4, 10, log=True)),
        ({"quniform": [0, 10, 2]}, Interval(0, 10, step=2)),
        (0.5, None),
        ({"name": "gc"}, None),
        ([1, 2], None),
    ],
)
def test_axes_and_constants_are_told_apart(text: Any, axis: Any) -> None:
    assert parse_axis("path", text) == axis


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"grid": []}, "takes a list"),
        ({"grid": 3}, "takes a list"),
        ({"uniform": [1, 0]}, "low < high"),
        ({"uniform": [0, 1, 2]}, "low < high"),
        ({"quniform": [0, 1]}, "step"),
        ({"quniform": [0, 1, -1]}, "step"),
        ({"loguniform": [0, 1]}, "low > 0"),
        ({"uniform": ["a", "b"]}, "low < high"),
        ({"unifrom": [0, 1]}, "did you mean 'uniform'"),
    ],
)
def test_malformed_axes_are_refused(text: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_axis("defense.sigma", text)


def test_the_grid_is_crossed_with_each_alternative_and_draws_are_repeatable() -> None:
    common = {"a": {"grid": [1, 2]}, "b": {"uniform": [0, 1]}}
    space = Space.parse(common, [{"defense.name": "none"}, {"defense.name": "gc", "p": {"grid": [3, 4, 5]}}])
    assert space.combinations == 2 + 6
    points = space.points(draws=4, seed=7)
    assert len(points) == 4 * 8 and points == space.points(draws=4, seed=7) != space.points(draws=4, seed=8)
    assert {(p["a"], p.get("p")) for p in points} == {(a, p) for a in (1, 2) for p in (None, 3, 4, 5)}


def test_a_plain_grid_is_not_repeated() -> None:
    assert len(Space.parse({"a": {"grid": [1, 2]}}, []).points(draws=5, seed=0)) == 2


def test_corners_hold_every_end_and_every_choice() -> None:
    space = Space.parse({"x": {"uniform": [0, 1]}, "y": {"choice": [5, 6, 7]}, "g": {"grid": [8, 9]}}, [])
    drawn, every = list(space.corners(grid=False)), list(space.corners(grid=True))
    assert {p["x"] for p in drawn} == {0, 1} and {p["y"] for p in drawn} == {5, 6, 7}
    assert {p["g"] for p in drawn} == {8} and {p["g"] for p in every} == {8, 9}


def test_a_huge_grid_is_refused_without_being_made() -> None:
    space = {f"a{number}": {"grid": list(range(10))} for number in range(12)}
    with pytest.raises(ConfigError, match=rf"1,000,000,000,000 points; at most {MOST_POINTS:,}"):
        Space.parse(space, [])


def test_settings_are_laid_by_path() -> None:
    base = {"defense": {"name": "gc", "prune": 0.5}, "attacks": [{"name": "dlg"}, {"name": "gia"}], "seed": 1}
    laid = lay(base, {"defense.sigma": 2.0, "defense.name": "dp", "attacks.1.iterations": 9, "new.deep": 1})
    assert laid["defense"] == {"name": "dp", "sigma": 2.0}, "another defense keeps nothing of the first"
    assert laid["attacks"] == [{"name": "dlg"}, {"name": "gia", "iterations": 9}]
    assert (laid["seed"], laid["new"]) == (1, {"deep": 1})
    assert base["defense"] == {"name": "gc", "prune": 0.5}, "the base is left alone"
    assert lay(base, {"defense.name": "gc"})["defense"] == base["defense"]


@pytest.mark.parametrize("path", ["attacks.2.iterations", "attacks.x", "seed.a"])
def test_paths_that_lead_nowhere_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="space: "):
        lay({"attacks": [{}, {}], "seed": 1}, {path: 1})
