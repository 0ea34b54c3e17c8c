"""What runs in a trial: one simulation, on worker actors in the trial's placement group.

The process of a trial outlives it (Tune reuses it for the next), and with it the worker actors, the connection to
MLflow and the data: from the second trial on, a trial starts in a fraction of a second.
"""

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.util import get_current_placement_group

from fedsim.config import ExperimentConfig
from fedsim.data.datasets import dataset_key
from fedsim.engine.runtime import Runtime
from fedsim.errors import FedsimError, RunError
from fedsim.progress import Reporter
from fedsim.results import SimulationResult
from fedsim.simulation import Simulation
from fedsim.sweep.config import ROUND_METRICS
from fedsim.sweep.plan import SweepPlan, Trial
from fedsim.tracking import TrackedRun, Tracker, patiently

REPORT_SECONDS = 0.2
"""Rounds that end faster than this one after the other and are not evaluated share a report to Tune."""


@dataclass(frozen=True)
class Tracking:
    """Where trials log: MLflow's store, the experiment, the folder of its artifacts, and the sweep's run."""

    uri: str
    experiment: str
    artifacts: str
    parent: str


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep share.

    Attributes:
        plan: The sweep.
        folder: Absolute path of the folder of the trials' folders.
        datasets: By `dataset_key`: fingerprint and object reference of each data set.
        tracking: Where to log; None: nowhere.
    """

    plan: SweepPlan
    folder: str
    datasets: dict[str, tuple[str, Any]]
    tracking: Tracking | None


class _Process:
    """What one trial process keeps from trial to trial."""

    runtime: Runtime | None = None
    tracker: Tracker | None = None

    @classmethod
    def open(cls, config: ExperimentConfig, shared: Shared) -> tuple[Runtime, Tracker | None]:
        """Return the worker actors and MLflow, started by the first trial of this process."""
        if cls.runtime is None:
            group = get_current_placement_group()
            if group is None:
                raise RunError("a trial runs in a placement group only; start it by `fedsim sweep`")
            cls.runtime = Runtime(config.runtime, group=group)
        where = shared.tracking
        if where and cls.tracker is None:
            cls.tracker = patiently(lambda: Tracker(where.uri, where.experiment, Path(where.artifacts)))
        return cls.runtime, cls.tracker


class TrialReporter(Reporter):
    """Tells Tune of every round, which may end the trial there and then."""

    def __init__(self, started: float) -> None:
        """Count from `started`, a time of the monotonic clock."""
        self.started, self.first_round = started, 0.0
        self._last, self._rounds = 0.0, 0

    def begin(self, title: str, rounds: int, done: int = 0) -> None:
        """See `Reporter.begin`."""
        self._rounds = rounds

    def round(self, record: dict[str, Any]) -> None:
        """See `Reporter.round`."""
        now = time.monotonic()
        self.first_round = self.first_round or now - self.started
        if "ACC" not in record and now - self._last < REPORT_SECONDS:
            return
        self._last = now
        values = {name: record[name] for name in ROUND_METRICS if record.get(name) is not None}
        tune.report({**values, "round": record["round"] + 1, "rounds": self._rounds})


def run_trial(config: dict[str, Any], shared: Shared) -> None:
    """Run one trial to its end and report its final metrics, or why it failed.

    A failure of the simulation is a result, which no retry would change; what Tune retries is a process that died.
    """
    trial = Trial(config["trial"], config["point"], config["seed"], config["values"])
    try:
        metrics = _simulate(trial, shared)
    except (
        Exception
    ) as error:  # whatever a defense or an attack of the user's raises ends this trial, not the sweep
        folder = Path(shared.folder) / trial.title
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        metrics = {"failure": _reason(error)}
    tune.report(metrics)


def _reason(error: Exception) -> str:
    """Return the failure in one line; of one that came from a worker, the cause and not the traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = " ".join(str(cause).split())
    return text if isinstance(cause, FedsimError) else f"{type(cause).__name__}: {text}"


def _simulate(trial: Trial, shared: Shared) -> dict[str, Any]:
    started = time.monotonic()
    config = shared.plan.experiment(trial)
    runtime, tracker = _Process.open(config, shared)
    fingerprint, reference = shared.datasets[dataset_key(config.data)]
    runtime.share(fingerprint, reference)
    reporter = TrialReporter(started)
    simulation = Simulation(
        config,
        output=Path(shared.folder) / trial.title,
        dataset=ray.get(reference),
        runtime=runtime,
        tracker=tracker,
        parent=TrackedRun(tracker, shared.tracking.parent) if tracker and shared.tracking else None,
        tags=trial_tags(shared.plan.config.name, trial, config),
        reporter=reporter,
    )
    result = simulation.run(resume=True)
    rounds = result.summary["rounds"]
    seconds = time.monotonic() - started
    extra = {
        "round": rounds,
        "rounds": rounds,
        "trial_seconds": seconds,
        "first_round_seconds": reporter.first_round,
    }
    return final_metrics(result) | extra


def trial_tags(sweep: str, trial: Trial, config: ExperimentConfig) -> dict[str, str]:
    """Return the tags of a trial's MLflow run; see `fedsim.sweep`."""
    named = trial.values.get("tags", {})
    return {
        "fedsim.kind": "trial",
        "fedsim.sweep": sweep,
        "fedsim.trial": trial.title,
        "fedsim.point": str(trial.point),
        "fedsim.dataset": config.data.name,
        "fedsim.defense": config.defense.name,
        "fedsim.seed": str(trial.seed),
        **{f"fedsim.{name}": str(value) for name, value in named.items()},
    }


def final_metrics(result: SimulationResult) -> dict[str, float]:
    """Return what a finished trial came to, by the names of `plan.reported`.

    `PSNR` and `SSIM` without an attack's name are those of the most successful audit, the highest mean.
    """
    last = result.history[-1]
    metrics = {name: float(last[name]) for name in ROUND_METRICS if name in last}
    metrics |= {"ART": result.average_round_time, "upload_bytes": float(result.summary["upload_bytes"])}
    if result.summary["overhead"]:
        metrics["ART_overhead"] = float(result.summary["overhead"]["median"])
    for metric in ("PSNR", "SSIM"):
        means = {(audit.attack, audit.stem): audit.mean(metric) for audit in result.audits}
        metrics |= _by_name(metric, means)
    return metrics


def _by_name(metric: str, means: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Return the mean of each audit, the highest of each attack and the highest of all."""
    if not means:
        return {}
    named = {f"{stem}.{metric}": value for (_, stem), value in means.items()}
    for attack in {attack for attack, _ in means}:
        named[f"{attack}.{metric}"] = max(value for (name, _), value in means.items() if name == attack)
    return named | {metric: float(np.max(list(means.values())))}
