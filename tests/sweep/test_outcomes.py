from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.sweep.config import Objective
from fedsim.sweep.outcomes import Outcome, OutcomeFolder, pareto, ranked

ACC, PSNR = Objective(metric="ACC", direction="max"), Objective(metric="PSNR", direction="min")


@given(hnp.arrays(float, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 3)))
def test_the_pareto_set_is_what_the_definition_says(values: np.ndarray) -> None:
    def beaten(row: int) -> bool:
        others = (v for v in values)
        return any(all(o >= values[row]) and any(o > values[row]) for o in others)

    assert pareto(values).tolist() == [not beaten(row) for row in range(len(values))]


def test_points_rank_by_the_mean_over_their_seeds() -> None:
    trials = [
        Outcome({"x": 1}, (0,), "finished", {"ACC": 0.5, "PSNR": 9}),
        Outcome({"x": 1}, (1,), "finished", {"ACC": 0.7, "PSNR": 11}),
        Outcome({"x": 2}, (0,), "finished", {"ACC": 0.9, "PSNR": 30}),
        Outcome({"x": 2}, (1,), "finished", {"ACC": 0.7, "PSNR": 30}),
        Outcome({"x": 3}, (0,), "finished", {"ACC": 0.99, "PSNR": 5}),
        Outcome({"x": 3}, (1,), "failed", {}, "why"),
        Outcome({"x": 4}, (0, 1), "finished", {"ACC": 0.5, "PSNR": 12}),
    ]
    found = ranked(trials, (ACC, PSNR))
    assert found["settings"].tolist() == ["x=2", "x=1", "x=4"], "a point with a failed seed does not count"
    assert found["ACC"].tolist() == pytest.approx([0.8, 0.6, 0.5])
    assert found["pareto"].tolist() == [True, True, False]
    assert ranked(trials, (PSNR,))["settings"].tolist() == ["x=1", "x=4", "x=2"]


def test_nothing_finished_ranks_nothing() -> None:
    assert ranked([Outcome({}, (0,))], (ACC,)).empty


def test_outcomes_come_back_as_they_were(tmp_path: Path) -> None:
    folder = OutcomeFolder(tmp_path / "outcomes")
    planned = Outcome({"defense.name": "gc", "attacks": [{"name": "dlg"}]}, (0, 1))
    assert folder.load(planned) == planned and not planned.done
    ended = Outcome(planned.point, planned.seeds, "stopped", {"ACC": 0.25})
    folder.save(ended)
    assert folder.load(planned) == ended and ended.done
    assert folder.every() == [ended]
