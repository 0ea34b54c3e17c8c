"""Population based training of a sweep's drawn settings, on Ray Tune."""

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining

from fedsim.sweep.config import PbtConfig, SweepConfig
from fedsim.sweep.space import Interval

AGE = "age"
"""What a trial reports of its rounds while there are more to come: whoever is through is not replaced."""


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population based training in step: all trials wait for each other, so that no outcome hangs on the clock."""

    _next_perturbation_sync: int

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Let the others go on if they all waited for a trial that ended early: Ray would leave them paused."""
        others = [other for other in tune_controller.get_live_trials() if other is not trial]
        ages = [self._trial_state[other].last_train_time for other in others]
        if ages and min(ages) >= self._next_perturbation_sync:
            self._next_perturbation_sync = min(ages) + self._perturbation_interval

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """See `on_trial_complete`."""
        self.on_trial_complete(tune_controller, trial, {})


def population(config: SweepConfig, scheduler: PbtConfig) -> PopulationBasedTraining:
    """Return the scheduler that replaces the worst trials of a sweep by changed copies of the best ones."""
    first, (space,) = config.objectives[0], config.parsed_space().alternatives
    axes = {path: axis for path, axis in space.random.items() if isinstance(axis, Interval)}
    # A stream of its own: the same draws as at the start would make members anew that were given up.
    rng = np.random.default_rng([config.search.seed, 1])
    random.seed(config.search.seed)  # Ray draws from Python's own generator whom to copy and what to change
    return Population(
        time_attr=AGE,
        metric=first.metric,
        mode=first.direction,
        perturbation_interval=scheduler.interval,
        quantile_fraction=scheduler.quantile,
        hyperparam_mutations={"trial": {"point": {path: partial(axes[path].sample, rng) for path in axes}}},
        custom_explore_fn=partial(vary, axes, rng),
        require_attrs=False,
        synch=True,
        log_config=False,
    )


def vary(axes: Mapping[str, Interval], rng: np.random.Generator, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copied trial's settings a little off what Ray made of them, and inside their intervals.

    Ray multiplies by 0.8 or 1.2: two copies of one trial could be the same, and each needs a folder of its own.
    """
    point = dict(settings["trial"]["point"])
    for path, axis in axes.items():
        value = float(point[path] * rng.uniform(0.95, 1.05))
        point[path] = value if axis.low <= value <= axis.high else axis.sample(rng)
    return {**settings, "trial": {**settings["trial"], "point": point}}
