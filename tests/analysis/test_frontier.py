from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.ablation import figures_of, importances, marginal
from analysis.frontier import Point, equals, interpolate, points
from analysis.statistics import Estimate
from analysis.sweeps import SweepResults, strongest


def sweep(rows: list[dict[str, Any]], images: list[dict[str, Any]]) -> SweepResults:
    frame = pd.DataFrame(rows).assign(dataset="digits", floor=12.0, floor_SSIM=0.3)
    seen = pd.DataFrame(images).assign(dataset="digits", attack="dlg", stalled=False, exhausted=False)
    varied = [c for c in frame.columns if c.startswith("defense.")]
    return SweepResults("s", "id", "", frame, seen, varied)


def trial(name: str, defense: str, acc: float, seed: int = 0, **settings: Any) -> dict[str, Any]:
    own = {f"defense.{key}": value for key, value in settings.items()}
    return {"trial": name, "seed": seed, "defense": defense, "ACC": acc, "ART": 0.1, **own}


def image(
    name: str, defense: str, psnr: float, adversary: str = "naive", strategy: str = "", seed: int = 0
) -> dict:
    own = {"trial": name, "defense": defense, "seed": seed, "adversary": adversary, "strategy": strategy}
    return {**own, "PSNR": psnr, "SSIM": psnr / 100}


@given(st.floats(-5, 5), st.floats(-50, 50), st.lists(st.floats(0, 100), min_size=2, max_size=9), st.floats(0, 1))
def test_interpolation_is_exact_on_a_line(slope: float, offset: float, xs: list[float], share: float) -> None:
    bar = min(xs) + share * (max(xs) - min(xs))
    found = interpolate([(x, slope * x + offset) for x in xs], bar)
    assert found is not None
    value, first, second = found
    assert value == pytest.approx(slope * bar + offset, abs=1e-6)
    assert second == first + 1
    assert min(xs[first], xs[second]) <= bar <= max(xs[first], xs[second])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9), st.floats(0.01, 50))
def test_nothing_is_guessed_beyond_the_curve(xs: list[float], beyond: float) -> None:
    curve = [(x, 0.0) for x in xs]
    assert interpolate(curve, max(xs) + beyond) is None
    assert interpolate(curve, min(xs) - beyond) is None


def test_the_first_crossing_counts() -> None:
    assert interpolate([(40, 0.9), (10, 0.8), (14, 0.7), (5, 0.6)], 12) == (
        pytest.approx(0.8 + 0.1 * 2 / 30),
        0,
        1,
    )


def test_each_adversary_gets_its_strongest_attack() -> None:
    images = pd.DataFrame(
        [
            *[image("a", "gc", p) for p in (10.0, 12.0)],
            *[image("a", "gc", p, "adaptive", "survivors") for p in (50.0, 60.0)],
            *[image("a", "gc", p, "adaptive", "thresholds") for p in (20.0, 99.0)],
            *[image("b", "pld", p) for p in (30.0, 34.0)],
            *[image("b", "pld", p, "adaptive", "muted") for p in (8.0, 9.0)],
        ]
    ).assign(attack="dlg")
    naive, adaptive = strongest(images, "naive"), strongest(images, "adaptive")
    assert naive.groupby("trial")["PSNR"].mean().to_dict() == {"a": 11, "b": 32}
    assert adaptive.groupby("trial")["PSNR"].mean().to_dict() == {"a": 59.5, "b": 32}
    assert len(adaptive) == 4, "one attack a trial"


def test_points_are_means_over_seeds_and_dominated_ones_are_marked() -> None:
    results = sweep(
        [
            trial("n", "none", 0.9),
            trial("w", "gc", 0.8, seed=0, prune=0.1),
            trial("w", "gc", 0.9, seed=1, prune=0.1),
            trial("d", "dp_gaussian", 0.7, sigma=0.1),
        ],
        [
            image("n", "none", 50.0),
            *[image("w", "gc", p, seed=s) for p, s in ((20.0, 0), (22.0, 0), (24.0, 1), (26.0, 1))],
            *[image("d", "dp_gaussian", p) for p in (24.0, 26.0)],
        ],
    )
    found = {point.defense: point for point in points(results)}
    assert found["gc"].ACC.value == pytest.approx(0.85) and found["gc"].PSNR.value == 23
    assert found["gc"].settings == "prune=0.1"
    assert {name: point.efficient for name, point in found.items()} == {
        "none": True,
        "gc": True,
        "dp_gaussian": False,
    }


def point(defense: str, acc: float, psnr: float, settings: str = "") -> Point:
    return Point("digits", "naive", defense, settings, settings, None, *(Estimate(v) for v in (acc, psnr, 0.1)), 0)


def test_equal_bars_name_the_points_between() -> None:
    found = [
        point("none", 0.9, 52),
        point("gc", 0.8, 32, "weak"),
        point("gc", 0.6, 2, "strong"),
        point("pld", 0.85, 40, "only"),
    ]
    rows = {(row.defense, row.held): row for row in equals(found, {"digits": 12.0})}
    assert rows["gc", "PSNR"].value == pytest.approx(0.6 + 0.2 / 3)
    assert rows["gc", "PSNR"].between == ("weak", "strong")
    assert rows["gc", "ACC"].value == pytest.approx(48) and rows["gc", "ACC"].between == ("no defense", "weak")
    assert rows["pld", "PSNR"].value is None and rows["pld", "PSNR"].between is None


def test_marginals_average_all_else() -> None:
    figures = pd.DataFrame({"defense.k": [1, 1, 2, 2], "defense.n": [5, 6, 5, 6], "ACC": [0.1, 0.3, 0.5, 0.7]})
    found = marginal(figures, "defense.k", "ACC")
    assert found["mean"].tolist() == pytest.approx([0.2, 0.6]) and found["trials"].tolist() == [2, 2]


def test_the_setting_that_decides_is_the_important_one() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=60), rng.uniform(size=60)
    figures = pd.DataFrame({"a": a, "b": b, "c": ["x"] * 60, "ACC": 3 * a})
    found = {one.path: one for one in importances(figures, ["a", "b", "c"], ["ACC"])}
    assert set(found) == {"a", "b"}, "what does not vary has no importance"
    assert found["a"].mean > 10 * abs(found["b"].mean) and found["a"].fit > 0.9
    assert importances(figures.head(8), ["a", "b"], ["ACC"]) == []


def test_trials_carry_the_strongest_attacks_figures() -> None:
    results = sweep([trial("n", "none", 0.9)], [image("n", "none", 50.0), image("n", "none", 52.0)])
    assert figures_of(results, "naive")["PSNR"].tolist() == [51]
