import math

import numpy as np
import pytest
from scipy import stats

from analysis.load import load_comparison
from analysis.summary import Block, paper_tables, summarise
from tests.analysis.synthetic import Cell, Store


def best(block: Block, metric: str) -> set[str]:
    return {name for name, column in block.columns.items() if column.scores[metric].best}


def test_values_and_intervals(block: Block) -> None:
    psnr = block.columns["graddefense"].scores["PSNR"]
    assert psnr.estimate is not None
    margin = stats.t(2).ppf(0.975) * np.std([5, 6, 7], ddof=1) / math.sqrt(3)
    assert (psnr.estimate.value, psnr.estimate.margin) == pytest.approx((6.0, margin))
    assert psnr.paper == 9.41
    assert block.baseline.scores["ACC"].estimate.value == pytest.approx(92)
    art = block.columns["graddefense"].scores["ART"].estimate
    assert (art.value, art.low, art.high) == pytest.approx((4, 3, 5))


def test_the_floor_is_the_best_blind_guess(block: Block) -> None:
    assert {metric: guess for metric, (guess, _) in block.floors.items()} == {"PSNR": "mean", "SSIM": "mean"}
    assert [value for _, value in block.floors.values()] == pytest.approx([12, 0.2])


def test_standings(block: Block) -> None:
    shown = {column.name: block.standing(column) for column in block.every}
    assert shown == {
        "none": "leaks",
        "graddefense": "floor",
        "gc": "leaks",
        "dp_gaussian": "uncounted",
        "dp_laplacian": "floor",
        "pld": "floor",
        "pld_muted": "leaks",
    }


def test_stalled_cells_are_counted_and_never_best(block: Block) -> None:
    flagged = block.columns["dp_gaussian"]
    assert (flagged.stalled, flagged.exhausted, flagged.images) == (1, 1, 3)
    # Its mean is the lowest of all, and that of PLD is undone by the muted attack.
    assert best(block, "PSNR") == {"graddefense", "dp_laplacian"}


def test_accuracy_with_one_seed_uses_the_test_images(block: Block) -> None:
    accuracy = block.columns["gc"].scores["ACC"].estimate
    expected = stats.binomtest(3700, 10_000).proportion_ci(0.95, method="wilson")
    assert (accuracy.low, accuracy.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert best(block, "ACC") == {"graddefense", "pld"}


def test_overhead_wins_by_its_quartiles(block: Block) -> None:
    assert best(block, "ART") == {"gc"}


def test_seeds_are_clusters(store: Store) -> None:
    cells = [Cell("gia", "digits", "none", [10.0 + s, 11.0 + s], seed=s, acc=0.9 + s / 100) for s in (0, 4)]
    store.comparison("seeds", cells)
    (block,) = summarise(load_comparison(store.uri, "seeds"))
    means = [10.5, 14.5]
    margin = stats.t(1).ppf(0.975) * stats.sem(means)
    assert block.baseline.scores["PSNR"].estimate.margin == pytest.approx(margin)
    assert block.baseline.scores["ACC"].estimate.margin == pytest.approx(
        stats.t(1).ppf(0.975) * stats.sem([90, 94])
    )
    assert block.baseline.seeds == 2


def test_overhead_over_seeds_spans_all_quartiles(store: Store) -> None:
    spreads = {0: (0.04, 0.03, 0.05), 1: (0.06, 0.01, 0.07)}
    store.comparison("spans", [Cell("gia", "digits", "gc", [9.0], s, overhead=o) for s, o in spreads.items()])
    (block,) = summarise(load_comparison(store.uri, "spans"))
    art = block.columns["gc"].scores["ART"].estimate
    assert (art.value, art.low, art.high) == pytest.approx((5, 1, 7))


def test_one_recovered_victim_is_a_leak_whatever_the_mean_says(store: Store) -> None:
    store.comparison("one", [Cell("dga", "digits", "gc", [*[4.0] * 20, 31.0])])
    (block,) = summarise(load_comparison(store.uri, "one"))
    assert block.columns["gc"].scores["PSNR"].estimate.high < 12
    assert block.standing(block.columns["gc"]) == "leaks"


def test_an_attack_that_fails_by_itself_shows_no_protection(store: Store) -> None:
    cells = [Cell("dga", "digits", "none", [9.0, 10.0, 11.0])]
    cells += [Cell("dga", "digits", "gc", [4.0, 4.1, 4.2]), Cell("dga", "digits", "pld", [20.0, 20.1, 20.2])]
    store.comparison("failing", cells)
    (block,) = summarise(load_comparison(store.uri, "failing"))
    assert not block.attack_works
    assert {name: block.standing(block.columns[name]) for name in ("gc", "pld")} == {
        "gc": "uncounted",
        "pld": "leaks",
    }
    assert best(block, "PSNR") == set()


def test_what_was_not_run_has_no_figure(store: Store) -> None:
    store.comparison("alone", [Cell("gia", "cifar10", "gc", [9.0, 10.0], test_images=None)])
    (block,) = summarise(load_comparison(store.uri, "alone"))
    pld = block.columns["pld"]
    assert [score.estimate for score in pld.scores.values()] == [None] * 4
    assert pld.scores["PSNR"].paper == 10.79
    assert block.standing(pld) is None
    assert not block.columns["gc"].scores["ACC"].estimate.has_interval
    assert [column.name for column in block.every] == ["gc"]


def test_paper_tables_are_the_slides() -> None:
    paper = paper_tables()
    assert paper["dga"]["mnist"]["graddefense"] == {"PSNR": 9.41, "SSIM": 0.046, "ACC": 90.43, "ART": 8.45}
    assert paper["gia"]["cifar10"]["pld_muted"] == {"PSNR": 27.04, "SSIM": 0.93, "ACC": None, "ART": None}
    assert {len(columns) for table in paper.values() for columns in table.values()} == {7}
