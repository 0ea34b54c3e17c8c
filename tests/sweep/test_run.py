from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from fedsim.errors import ConfigError
from fedsim.sweep import run
from fedsim.sweep.config import SweepConfig
from fedsim.sweep.outcomes import OutcomeFolder
from fedsim.sweep.run import Sweep
from fedsim.sweep.tuning import Tuning


def sweep(folder: Path, **settings: Any) -> Sweep:
    experiment = {"federation": {"rounds": 9, "clients": 20, "clients_per_round": 4}}
    space = {"federation.learning_rate": {"grid": [0.1, 0.2]}}
    return Sweep(
        SweepConfig.model_validate({"name": "s", "experiment": experiment, "space": space} | settings), folder
    )


class Trial:
    def __init__(self, number: int) -> None:
        self.trial_id = str(number)


def test_asha_stops_the_worse_and_leaves_the_better_its_last_audits(tmp_path: Path) -> None:
    asha = {"name": "asha", "grace_rounds": 1, "reduction_factor": 3}
    config = sweep(tmp_path, scheduler=asha).config
    scheduler = Tuning(config, tmp_path, OutcomeFolder(tmp_path), [], None).scheduler()
    trials: list[Any] = [Trial(number) for number in range(6)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    actions = {}
    for number, trial in reversed(list(enumerate(trials))):
        for round_ in range(1, 10):
            result = {"round": round_, "ACC": number / 10, "training_iteration": round_}
            actions[number] = scheduler.on_trial_result(None, trial, result)
            if actions[number] == TrialScheduler.STOP:
                break
    assert actions[5] == TrialScheduler.CONTINUE
    assert actions[0] == TrialScheduler.STOP


@pytest.mark.parametrize("clients", [2000, 1400])
def test_a_point_whose_data_cannot_be_split_is_refused_before_anything_starts(
    tmp_path: Path, clients: int
) -> None:
    space = {"federation.clients": {"grid": [20, clients]}}
    with pytest.raises(ConfigError, match="clients"):
        sweep(tmp_path, space=space)
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_is_over_starts_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = sweep(tmp_path, tracking={"uri": "off"})
    over._claim()
    for planned in over.plan:
        over.outcomes.save(replace(planned, status="finished", metrics={"ACC": 0.5}))

    def start(*arguments: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(run, "Cluster", start)
    assert [outcome.status for outcome in over.run(resume=True)] == ["finished"] * 2
    (over.outcomes.path / f"{over.plan[0].name}.json").unlink()
    with pytest.raises(AssertionError, match="Ray was started"):
        over.run(resume=True)
