"""What runs inside one trial of Ray Tune: the simulations of one point, a seed after the other."""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune

from fedsim.config import ExperimentConfig, RuntimeConfig
from fedsim.data.datasets import Dataset, dataset_key
from fedsim.engine.checkpoints import CheckpointFolder
from fedsim.engine.process import start_process
from fedsim.engine.runtime import Runtime
from fedsim.errors import FedsimError
from fedsim.progress import Reporter
from fedsim.results import RunFolder, SimulationResult
from fedsim.simulation import Simulation
from fedsim.sweep.config import PbtConfig, SweepConfig, point_id
from fedsim.sweep.evolution import AGE
from fedsim.sweep.metrics import ROUND_METRICS, final_metrics
from fedsim.sweep.space import Point
from fedsim.tracking import TrackedRun, Tracker

REPORT_SECONDS = 1.0
"""Between evaluations a trial reports at most this often: a report costs as much as a small round."""


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share.

    Attributes:
        config: The sweep.
        folder: The sweep's folder, absolute: Tune changes the working directory.
        tracking_uri: MLflow's store; None logs nothing.
        parent_run: The sweep's own MLflow run.
        data: Each data set by its key, as an object-store reference in a list, so that Ray leaves it be.
        sys_path: Where users' modules lie.
        data_dir: Where the data sets of public images lie, absolute.
    """

    config: SweepConfig
    folder: Path
    tracking_uri: str | None
    parent_run: str | None
    data: Mapping[str, Sequence[Any]]
    sys_path: Sequence[str]
    data_dir: Path | None = None

    def run_folder(self, name: str) -> Path:
        """Return the folder of one simulation."""
        return self.folder / "trials" / name


def run_trial(settings: Mapping[str, Any], context: TrialContext) -> None:
    """Run the simulations of `settings["trial"]` (a point and its seeds) and report their mean at the end.

    A simulation that is finished already is only read back; one with a checkpoint goes on from it. An error that
    fedsim raises on purpose is reported, not raised: the same trial would only fail again.
    """
    start_process(context.sys_path)
    for name in ("ray.train", "ray.tune"):  # a line a checkpoint would drown the sweep's own
        logging.getLogger(name).setLevel(logging.WARNING)
    point, seeds = settings["trial"]["point"], settings["trial"]["seeds"]
    reporter = TuneReporter({objective.metric for objective in context.config.objectives})
    found = []
    for seed in seeds:
        config = context.config.experiment_at(point, seed)
        try:
            result = _simulate(config, point, context, reporter)
        except FedsimError as error:
            tune.report({"error": f"{config.name}: {error}", "round": reporter.rounds_before})
            return
        reporter.rounds_before += config.federation.rounds
        found.append(final_metrics(result))
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    tune.report({**means, **reporter.times(), "round": reporter.rounds_before, "finished": True})


def _simulate(
    config: ExperimentConfig, point: Point, context: TrialContext, reporter: "TuneReporter"
) -> SimulationResult:
    reference = context.data[dataset_key(config.data)][0]
    dataset: Dataset = ray.get(reference)
    runtime = _runtime(config.runtime)
    runtime.share(dataset.fingerprint, reference)
    folder = context.run_folder(config.name)
    _restore(config, folder, evolving=isinstance(context.config.scheduler, PbtConfig))
    tracker = _tracker(context)
    simulation = Simulation(
        config,
        output=folder,
        data_dir=context.data_dir,
        dataset=dataset,
        runtime=runtime,
        tracker=tracker,
        parent=TrackedRun(tracker, context.parent_run) if tracker and context.parent_run else None,
        tags={
            "fedsim.kind": "trial",
            "fedsim.sweep": context.config.name,
            "fedsim.trial": point_id(point),
            "fedsim.dataset": config.data.name,
            "fedsim.defense": config.defense.name,
            "fedsim.seed": str(config.seed),
        },
        reporter=reporter,
    )
    return simulation.run(resume=True)


class TuneReporter(Reporter):
    """Reports a simulation's rounds to Tune, which may stop the trial there."""

    def __init__(self, wanted: set[str]) -> None:
        """Start the clock; every round is reported if it holds one of the `wanted` metrics.

        Attributes:
            rounds_before: Rounds of the simulations of this trial that are behind it.
        """
        self.rounds_before, self.every = 0, bool(wanted & {"loss", "seconds", "upload_bytes"})
        self.began, self.setup = time.monotonic(), 0.0
        self.reported, self.rounds = 0.0, 0
        self.checkpoint: Path | None = None

    def begin(self, title: str, rounds: int, done: int = 0) -> None:
        """Note how long it took until the first simulation could begin."""
        self.setup = self.setup or time.monotonic() - self.began
        self.rounds = rounds

    def times(self) -> dict[str, float]:
        """Return the seconds of the trial's set-up and of the whole trial."""
        return {"setup_seconds": self.setup, "trial_seconds": time.monotonic() - self.began}

    def round(self, record: dict[str, Any]) -> None:
        """Report evaluated rounds, and others if the last report is a while ago."""
        now = time.monotonic()
        if not (self.every or "ACC" in record or now - self.reported > REPORT_SECONDS):
            return
        self.reported = now
        metrics = {name: record[name] for name in ROUND_METRICS if record.get(name) is not None}
        done = record["round"] + 1
        metrics["round"] = self.rounds_before + done
        if done < self.rounds:
            metrics[AGE] = done
        saved, self.checkpoint = self.checkpoint, None
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(saved)) if saved else None)

    def saved(self, checkpoint: Path) -> None:
        """Hand the checkpoint to Tune with the next report, so that another node can go on from it."""
        self.checkpoint = checkpoint.parent


def _restore(config: ExperimentConfig, folder: Path, evolving: bool) -> None:
    """Lay the checkpoints that Tune has for this trial where the simulation looks, if nothing is there yet.

    So it is on a node that has not run the trial before, and in a population, where the checkpoint is that of
    another trial with other settings (`evolving`) and is made this one's.
    """
    kept = tune.get_checkpoint()
    if kept is None or folder.exists():
        return
    with kept.as_directory() as directory:
        # Of a trial with several seeds it may be that of another seed.
        if not evolving and CheckpointFolder(Path(directory), config.fingerprint()).latest() is None:
            return
        RunFolder(folder).claim(config)
        checkpoints = CheckpointFolder(folder / "checkpoints", config.fingerprint())
        shutil.copytree(directory, checkpoints.folder)
    if evolving:
        checkpoints.adopt()


_held: dict[str, Runtime] = {}
_trackers: dict[str, Tracker] = {}


def _runtime(config: RuntimeConfig) -> Runtime:
    """Return the actors of this process, kept for its next trials: starting them takes seconds."""
    key = config.model_dump_json()
    if key not in _held:
        while _held:
            _held.popitem()[1].close()
        _held[key] = Runtime(config)
    return _held[key]


def _tracker(context: TrialContext) -> Tracker | None:
    uri = context.tracking_uri
    if uri is not None and uri not in _trackers:
        _trackers[uri] = Tracker(uri, context.config.tracking.experiment)
    return _trackers[uri] if uri is not None else None
