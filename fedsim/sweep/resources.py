"""What a trial takes of a cluster, and whether there is as much."""

from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from fedsim.config import RuntimeConfig
from fedsim.errors import ConfigError
from fedsim.sweep.config import SweepConfig
from fedsim.sweep.space import Point


def widest(config: SweepConfig) -> int:
    """Return the workers of the trial that has most."""
    return max(_workers(_runtime(config, point)) for point in _corners(config))


def trials_at_a_time(config: SweepConfig) -> int:
    """Return how many trials the CPUs have room for, were all as wide as the widest."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // widest(config))


def check_room(config: SweepConfig) -> None:
    """See that every trial can be placed on the cluster as it is, unless it grows on demand.

    Raises:
        ConfigError: If not, with what it needs and what there is.
    """
    if config.elastic:
        return
    there = ray.cluster_resources()
    for runtime in (_runtime(config, point) for point in _corners(config)):
        for kind, amount in _bundle(runtime).items():
            needs = amount * _workers(runtime)
            if needs > there.get(kind, 0):
                raise ConfigError(
                    f"{config.name}: a trial needs {needs:g} {kind} for {_workers(runtime)} workers, but "
                    f"the cluster has {there.get(kind, 0):g}; lower runtime.workers, or set elastic: true if "
                    "the cluster grows on demand"
                )


def reserve(config: SweepConfig, settings: Mapping[str, Any]) -> tune.PlacementGroupFactory:
    """Reserve for a trial's workers, so that no pending trial can hold what another's workers wait for."""
    point = settings["trial"]["point"] if settings.get("trial") else _corners(config)[0]
    runtime = _runtime(config, point)
    return tune.PlacementGroupFactory([{}, *[_bundle(runtime)] * _workers(runtime)])


def _corners(config: SweepConfig) -> list[Point]:
    return list(config.parsed_space().corners(grid=True))


def _runtime(config: SweepConfig, point: Point) -> RuntimeConfig:
    return config.experiment_at(point, config.seeds[0]).runtime


def _workers(runtime: RuntimeConfig) -> int:
    return 1 if runtime.workers == "auto" else runtime.workers


def _bundle(runtime: RuntimeConfig) -> dict[str, float]:
    """Return what one worker of a trial takes."""
    return {"CPU": 1.0, "GPU": runtime.gpus_per_worker} if ray.cluster_resources().get("GPU") else {"CPU": 1.0}
