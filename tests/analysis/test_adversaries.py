import io
from datetime import UTC, datetime

import pandas as pd
import pytest

from analysis import adversaries
from analysis.load import Comparison

PLACE = {"table": "gia", "dataset": "digits", "seed": 0}


def comparison(rows: list[tuple[str, str, str, float, float]]) -> Comparison:
    """One image for each (defense, adversary, strategy, PSNR, SSIM)."""
    images = pd.DataFrame(
        {**PLACE, "defense": d, "attack": "gia", "adversary": a, "strategy": s, "PSNR": p, "SSIM": q}
        for d, a, s, p, q in rows
    ).assign(stalled=False, exhausted=False, learned="")
    images["stalled"] = images["PSNR"] == 7
    cells = images[["table", "dataset", "defense", "seed"]].drop_duplicates()
    floors = pd.DataFrame(
        [{**PLACE, "defense": "gc", "guess": g, "PSNR": p} for g, p in (("grey", 9), ("mean", 11))]
    )
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return Comparison("c", "id", "uri", moment, "", cells, images, pd.DataFrame(), floors, {}, {})


ROWS = [
    *[("none", "naive", "", psnr, 0.9) for psnr in (40.0, 44.0)],
    *[("gc", "naive", "", psnr, 0.2) for psnr in (8.0, 10.0)],
    *[("gc", "adaptive", "survivors", psnr, 0.8) for psnr in (24.0, 26.0)],
    *[("gc", "adaptive", "thresholds", psnr, 0.3) for psnr in (19.0, 30.0)],
    *[("graddefense", "naive", "", psnr, 0.6) for psnr in (21.0, 19.0)],
    *[("graddefense", "adaptive", "slices", psnr, 0.1) for psnr in (7.0, 9.0)],
    *[("graddefense", "oracle", "told_slices", psnr, 0.9) for psnr in (25.0, 25.0)],
]


def test_each_adversary_does_the_best_that_it_and_those_below_it_can() -> None:
    found = {(r.defense, r.adversary): r for r in adversaries.summarise(comparison(ROWS))}
    assert len(found) == 1 + 3 + 3, "nobody needs to know a defense that is not there"
    assert [found["gc", a].strategy for a in adversaries.ADVERSARIES] == ["", "survivors", "survivors"]
    assert [found["gc", a].told for a in adversaries.ADVERSARIES] == [True, True, False]
    assert found["graddefense", "adaptive"].strategy == "", "its own strategy is worse than the plain attack"
    assert found["graddefense", "oracle"].PSNR.value == 25
    assert [found["graddefense", a].unsound for a in adversaries.ADVERSARIES] == [0, 0, 0]
    assert found["gc", "naive"].floor == 11


def test_of_equal_strategies_one_counts() -> None:
    twins = [("gc", a, s, p, 0.9) for a, s in (("adaptive", "slices"), ("oracle", "told")) for p in (30.0, 40.0)]
    (*_, oracle) = adversaries.summarise(comparison(twins))
    assert (oracle.adversary, oracle.strategy, oracle.images) == ("oracle", "slices", 2)


def test_success_needs_both_figures() -> None:
    found = {(r.defense, r.adversary): r.success.value for r in adversaries.summarise(comparison(ROWS))}
    assert found["none", "naive"] == 1 and found["gc", "adaptive"] == 1
    assert found["graddefense", "naive"] == 0.5, "19 dB is not enough"


def test_every_strategy_is_listed_and_searches_that_failed_are_marked() -> None:
    rows = adversaries.every(comparison(ROWS))
    frame = pd.read_csv(io.StringIO(adversaries.csv(rows)))
    assert len(frame) == 7
    slices = frame[frame["strategy"] == "slices"].iloc[0]
    assert slices["PSNR"] == 8 and slices["unsound"] == 1 and slices["images"] == 2
    assert "†(1)" in adversaries.markdown(rows) and "stalled" in adversaries.markdown(rows)


def test_the_table_names_floor_and_ceiling() -> None:
    text = adversaries.markdown(adversaries.summarise(comparison(ROWS)))
    assert "blind guess) 11.0 dB" in text and "defense) 42.0 dB" in text
    assert "| GC | oracle | nothing more to tell | 25.0" in text


@pytest.mark.parametrize("write", [adversaries.csv, adversaries.markdown])
def test_naive_adversaries_alone_make_no_table(write) -> None:  # type: ignore[no-untyped-def]
    assert write(adversaries.summarise(comparison([r for r in ROWS if r[1] == "naive"]))) == ""


def test_what_an_attack_had_learned_is_in_the_csv() -> None:
    told = comparison(ROWS)
    told.images.loc[told.images["strategy"] == "survivors", "learned"] = "tv 30 chosen"
    frame = pd.read_csv(io.StringIO(adversaries.csv(adversaries.every(told))), keep_default_na=False)
    expected = ["tv 30 chosen" if name == "survivors" else "" for name in frame["strategy"]]
    assert frame["learned"].tolist() == expected
