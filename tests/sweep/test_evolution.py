"""Population based training: who waits for whom."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial

from fedsim.sweep.config import PbtConfig, SweepConfig
from fedsim.sweep.evolution import Population, population, vary
from fedsim.sweep.space import Interval


@pytest.fixture
def waiting() -> Population:
    """A population that meets after 4 rounds."""
    config = SweepConfig(
        name="tiny",
        space={"federation.learning_rate": {"uniform": [0.1, 1.0]}},
        objectives=[{"metric": "loss", "direction": "min"}],
        scheduler={"name": "pbt", "interval": 4},
    )
    assert isinstance(config.scheduler, PbtConfig)
    return population(config, config.scheduler)


@dataclass(eq=False)
class FakeTrial:
    """Stands in for a trial of Tune."""

    number: int
    status: str = Trial.PAUSED


def controller(scheduler: Population, ages: list[int]) -> Any:
    """Stand in for Tune's controller of paused trials that have trained so many rounds."""
    trials = [FakeTrial(number) for number in range(len(ages))]
    states = [SimpleNamespace(last_train_time=age) for age in ages]
    scheduler._trial_state = dict(zip(trials, states, strict=True))
    return SimpleNamespace(get_live_trials=lambda: trials, get_trials=lambda: trials)


@pytest.mark.parametrize("end", ["on_trial_complete", "on_trial_error"])
def test_who_waited_for_a_trial_that_ended_early_goes_on(waiting: Population, end: str) -> None:
    tune = controller(waiting, ages=[4, 4, 2])
    assert waiting.choose_trial_to_run(tune).number == 2, "the others wait for it"
    tune.get_live_trials()[2].status = Trial.TERMINATED
    assert waiting.choose_trial_to_run(tune) is None, "as Ray leaves them"
    getattr(waiting, end)(tune, tune.get_live_trials()[2], *([{}] if end == "on_trial_complete" else []))
    assert waiting.choose_trial_to_run(tune).number == 0


def test_an_end_does_not_hurry_those_who_still_train(waiting: Population) -> None:
    tune = controller(waiting, ages=[4, 2, 3])
    tune.get_live_trials()[2].status = Trial.TERMINATED
    waiting.on_trial_complete(tune, tune.get_live_trials()[2], {})
    assert waiting.choose_trial_to_run(tune).number == 1
    tune.get_live_trials()[1].status = Trial.RUNNING
    assert waiting.choose_trial_to_run(tune) is None


@given(st.floats(0, 3), st.integers(0, 2**32))
def test_copies_of_one_trial_differ_and_stay_inside(value: float, seed: int) -> None:
    rng, axes = np.random.default_rng(seed), {"x": Interval(0.1, 2)}
    settings = {"trial": {"point": {"x": value, "fixed": 1}, "seeds": [0]}}
    one, two = (vary(axes, rng, settings)["trial"] for _ in range(2))
    assert one["point"]["x"] != two["point"]["x"]
    for trial in (one, two):
        assert 0.1 <= trial["point"]["x"] <= 2
        assert trial["seeds"] == [0] and trial["point"]["fixed"] == 1
    if 0.11 < value < 1.9:
        assert one["point"]["x"] == pytest.approx(value, rel=0.05)
