import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.config import merged
from fedsim.errors import ConfigError
from fedsim.sweep import space as spaces

LEAVES = st.one_of(st.integers(0, 9), st.sampled_from(["a", "b"]), st.none())
FINITE = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"grid": options}),
        st.lists(inner, min_size=1, max_size=2),
        st.dictionaries(st.sampled_from(["x", "y", "z"]), inner, min_size=1, max_size=2),
    ),
    max_leaves=8,
)
RANGES = st.sampled_from(
    [
        {"uniform": [-1, 2.5]},
        {"loguniform": ["1e-4", 10]},
        {"quniform": [0.1, 0.95, 0.2]},
        {"quniform": [2, 12, 3]},
        {"randint": [3, 5]},
    ]
)
ANY = st.recursive(
    st.one_of(LEAVES, RANGES),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"choice": options}),
        st.dictionaries(st.sampled_from(["x", "y"]), inner, min_size=1, max_size=2),
    ),
    max_leaves=8,
)


def reference(value: Any) -> list[Any]:
    """All values of a finite space as it is written, by plain recursion over the YAML."""
    if isinstance(value, dict) and "grid" in value:
        return [one for option in value["grid"] for one in reference(option)]
    if isinstance(value, dict):
        return [dict(zip(value, row, strict=True)) for row in itertools.product(*map(reference, value.values()))]
    if isinstance(value, list):
        return [list(row) for row in itertools.product(*map(reference, value))]
    return [value]


@given(FINITE)
def test_a_grid_is_every_combination_and_is_counted_without_being_made(written: Any) -> None:
    space = spaces.parse(written, "p")
    found = list(spaces.enumerate_grid(space))
    assert found == reference(written)
    assert spaces.count(space) == len(found)
    assert spaces.is_grid(space)


def test_counting_a_vast_grid_makes_nothing() -> None:
    axis = {"grid": list(range(1000))}
    assert spaces.count(spaces.parse({str(n): axis for n in range(20)}, "p")) == 1000**20


class Extreme:
    """Draws that an adversary makes: options in turn, and one end of every range."""

    def __init__(self, picks: list[int], high: bool) -> None:
        self.picks, self.high, self.names = picks, high, list[str]()

    def pick(self, name: str, count: int) -> int:
        self.names.append(name)
        return self.picks.pop() % count if self.picks else 0

    def number(self, name: str, among: spaces.Range) -> float:
        self.names.append(name)
        return among.high if self.high else among.low


@given(ANY, st.lists(st.integers(0, 5), max_size=6), st.booleans())
def test_no_two_draws_of_a_point_share_a_name(written: Any, picks: list[int], high: bool) -> None:
    draws = Extreme(list(picks), high)
    spaces.draw(spaces.parse(written, "p"), draws)
    assert len(set(draws.names)) == len(draws.names)


def leaves(value: Any) -> set[Any]:
    if isinstance(value, dict | list):
        return set().union(*map(leaves, value.values() if isinstance(value, dict) else value))
    return {value}


@given(ANY, st.lists(st.integers(0, 5), max_size=6), st.booleans())
def test_corners_hold_every_value_that_extreme_draws_can_have(written: Any, picks: list[int], high: bool) -> None:
    space = spaces.parse(written, "p")
    covered = set().union(*map(leaves, spaces.corners(space)))
    assert leaves(spaces.draw(space, Extreme(list(picks), high))) <= covered


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    assert spaces.parse({"loguniform": ["1e-4", "1E1"]}, "p") == spaces.Range(1e-4, 10.0, log=True)
    assert spaces.parse({"grid": ["1e-3", "e3", "1x"]}, "p").options == (1e-3, "e3", "1x")


@pytest.mark.parametrize(
    ("written", "fragment"),
    [
        ({"logunifrom": [1, 2]}, "did you mean 'loguniform'"),
        ({"uniform": [2, 1]}, "low < high"),
        ({"uniform": [1]}, "[low, high]"),
        ({"uniform": ["a", 2]}, "numbers"),
        ({"uniform": [0, float("inf")]}, "numbers"),
        ({"loguniform": [0, 1]}, "low > 0"),
        ({"quniform": [0, 1, 0]}, "step > 0"),
        ({"quniform": [0, 1]}, "[low, high, step]"),
        ({"randint": [0.5, 2]}, "whole numbers"),
        ({"grid": []}, "needs a list"),
        ({"grid": 3}, "needs a list"),
        ({"grid": [1], "choice": [2]}, "stands alone"),
    ],
)
def test_a_distribution_written_wrongly_is_refused_with_its_path(written: Any, fragment: str) -> None:
    with pytest.raises(ConfigError, match="space: defense.sigma: ") as caught:
        spaces.parse(written, "defense.sigma")
    assert fragment in str(caught.value)


SETTINGS = st.recursive(
    LEAVES,
    lambda inner: st.dictionaries(st.sampled_from(["name", "x", "y"]), inner, max_size=3).filter(
        lambda one: not isinstance(one.get("name"), dict)
    ),
    max_leaves=6,
).filter(lambda one: isinstance(one, dict))


@given(SETTINGS, SETTINGS)
def test_laying_a_mapping_is_merging_it(base: dict[str, Any], over: dict[str, Any]) -> None:
    base, over = {"part": base}, {"part": over}
    assert spaces.lay(base, [], over) == merged(base, over)


def test_a_point_is_laid_name_first_and_reaches_into_lists() -> None:
    base = {"defense": {"name": "gc", "prune": 0.5}, "attacks": [{"name": "dlg"}, {"name": "gia"}]}
    point = {
        "defense.sigma": 0.1,
        "attacks.1.iterations": 7,
        "defense.name": "dp_gaussian",
        "data": {"name": "mnist"},
    }
    assert spaces.lay_point(base, point) == {
        "defense": {"name": "dp_gaussian", "sigma": 0.1},
        "attacks": [{"name": "dlg"}, {"name": "gia", "iterations": 7}],
        "data": {"name": "mnist"},
    }
    with pytest.raises(ConfigError, match="no item '2' in a list of 2"):
        spaces.lay_point(base, {"attacks.2.iterations": 1})
