"""Population based training of a sweep's drawn settings, on Ray Tune."""

from functools import partial
from typing import Any

import numpy as np
from ray.tune.schedulers import PopulationBasedTraining

from fedsim.sweep.config import PbtConfig, SweepConfig
from fedsim.sweep.space import Axis, Choice, Interval


def population(config: SweepConfig, scheduler: PbtConfig) -> PopulationBasedTraining:
    """Return the scheduler that replaces the worst trials of a sweep by changed copies of the best ones."""
    first, (space,) = config.objectives[0], config.parsed_space().alternatives
    rng = np.random.default_rng(config.search.seed)
    mutations = {path: _mutation(axis, rng) for path, axis in space.random.items()}
    return PopulationBasedTraining(
        time_attr="round",
        metric=first.metric,
        mode=first.direction,
        perturbation_interval=scheduler.interval,
        quantile_fraction=scheduler.quantile,
        hyperparam_mutations={"trial": {"point": mutations}},
        custom_explore_fn=partial(keep_inside, dict(space.random)),
        require_attrs=False,
        log_config=False,
    )


def _mutation(axis: Axis, rng: np.random.Generator) -> Any:
    """Return what Tune moves along: the values of a choice, or a source of fresh draws."""
    return list(axis.values) if isinstance(axis, Choice) else partial(axis.sample, rng)


def keep_inside(axes: dict[str, Axis], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's settings with every changed number inside its interval, on a whole number of steps."""
    point = dict(settings["trial"]["point"])
    for path, axis in axes.items():
        if isinstance(axis, Interval):
            point[path] = axis.nearest(point[path])
    return {**settings, "trial": {**settings["trial"], "point": point}}
