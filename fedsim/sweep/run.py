"""A sweep from its plan to its summary: Ray Tune chooses and places the trials."""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from rich.console import Console

from fedsim.config import ExperimentConfig, RuntimeConfig, read_yaml
from fedsim.data.datasets import Dataset, dataset_key, load_dataset
from fedsim.engine.runtime import Cluster
from fedsim.errors import ConfigError
from fedsim.files import check_folder, write_atomically
from fedsim.preparation import prepare
from fedsim.sweep.config import (
    AshaConfig,
    MedianConfig,
    OptunaSearchConfig,
    PbtConfig,
    SweepConfig,
    check_sweep,
)
from fedsim.sweep.evolution import population
from fedsim.sweep.outcomes import Outcome, OutcomeFolder, as_frame
from fedsim.sweep.progress import StopRule, SweepProgress
from fedsim.sweep.settle import settle
from fedsim.sweep.space import Point
from fedsim.sweep.trial import TrialContext, run_trial
from fedsim.tracking import TrackedRun, Tracker, resolve_uri

# Read by Tune: relative paths of the user keep their meaning, a report need not hold every objective, and nobody
# needs Tune's own progress and logs beside ours and MLflow's.
TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass
class Sweep:
    """Runs the trials of a sweep and keeps each as soon as it is done.

    Attributes:
        config: What is swept.
        root: Output root; the sweep's folder is `root / name`.
        data_dir: Where data sets lie.
        address: Ray cluster; None: this machine.
        console: Where progress is shown.
        storage: Where checkpoints are kept, so that a trial can go on from them on another node: a folder that
            all nodes share, or `s3://…`; None: the sweep's own folder, which does on one machine.
    """

    config: SweepConfig
    root: Path
    data_dir: Path | None = None
    address: str | None = None
    console: Console = field(default_factory=Console)
    storage: str | None = None

    def __post_init__(self) -> None:
        """Check every point and load the data; nothing is started.

        Raises:
            ConfigError: If anything in the input is wrong.
        """
        check_sweep(self.config)
        if self.address and not self.storage:
            raise ConfigError(
                "--storage: a cluster's nodes need a common place for checkpoints: a folder or s3://…"
            )
        self.adaptive = isinstance(self.config.search, OptunaSearchConfig)
        self.evolving = isinstance(self.config.scheduler, PbtConfig)
        self.points = [] if self.adaptive else self.config.points()
        self.datasets: dict[str, Dataset] = {}
        samples = list(self.config.parsed_space().corners(grid=True))
        prepared = set()
        for point in [*samples, *self.points]:
            config = self.config.experiment_at(point, self.config.seeds[0])
            key = dataset_key(config.data)
            if key not in self.datasets:
                self.datasets[key] = load_dataset(config.data, self.data_dir)
            if _kind(config) not in prepared:
                prepared.add(_kind(config))
                prepare(config, self.datasets[key], self.data_dir)
        self.widest = max(_workers(self._example(point).runtime) for point in samples)

    def _example(self, point: Point) -> ExperimentConfig:
        return self.config.experiment_at(point, self.config.seeds[0])

    @property
    def folder(self) -> Path:
        """Where the sweep is kept."""
        return (self.root / self.config.name).resolve()

    @property
    def tracking_uri(self) -> str | None:
        """MLflow's store; None logs nothing."""
        uri = self.config.tracking.uri
        return None if uri == "off" else resolve_uri(uri, self.root)

    @property
    def plan(self) -> list[Outcome]:
        """The trials of a grid or random search, none of them begun."""
        return [Outcome(point, (seed,)) for point in self.points for seed in self.config.seeds]

    @property
    def outcomes(self) -> OutcomeFolder:
        """How the trials ended."""
        return OutcomeFolder(self.folder / "outcomes")

    def run(self, resume: bool = False) -> list[Outcome]:
        """Run what is not done yet; return how every simulation ended, those of earlier sessions included.

        Raises:
            ConfigError: If the folder holds another sweep, or this one and `resume` is false; if the tracking
                store or the cluster cannot be reached, or a trial can never be placed on it.
            KeyboardInterrupt: If it was interrupted; what is done is kept.
        """
        self._check_folder(resume)
        tracker = None
        if self.tracking_uri:
            tracker = Tracker(self.tracking_uri, self.config.tracking.experiment, self.root / "mlartifacts")
        parent, status = None, "KILLED"
        try:
            # Ray takes seconds to start: a sweep that is over is only summarised again.
            with nullcontext() if self._is_over() else Cluster(self.address, self.widest) as cluster:
                if cluster:
                    self._check_room()
                self._claim()
                parent = self._start(tracker) if tracker else None
                outcomes = self._tune(parent.run_id if parent else None)
            status = "FAILED" if any(one.status == "failed" for one in outcomes) else "FINISHED"
            self._summarise(outcomes, parent)
            return outcomes
        finally:
            # What Tune kept is for this session's trials only.
            shutil.rmtree(self.folder / "tune", ignore_errors=True)
            if tracker and parent:
                settle(tracker, parent, self.outcomes.every())
                parent.finish(status)

    def _is_over(self) -> bool:
        """Return whether every planned trial is done; what Optuna would still ask for is not looked at."""
        return not self.adaptive and all(self.outcomes.load(planned).done for planned in self.plan)

    def _tune(self, parent_run: str | None) -> list[Outcome]:
        search, space, trials = self._search()
        if trials > 0:
            # A population meets only if Tune knows all of it, also those that wait for a place.
            pending = {"TUNE_MAX_PENDING_TRIALS_PG": str(trials)} if self.evolving else {}
            os.environ.update(TUNE_SETTINGS | pending)
            rule = StopRule(self.config)
            progress = SweepProgress(self.config, trials, self.outcomes, rule, self.console)
            with progress.bar:
                self._tuner(parent_run, search, space, trials, progress, rule).fit()
            if progress.done < trials and not rule.over:
                raise KeyboardInterrupt
        if self.adaptive or self.evolving:
            return self.outcomes.every()
        return [self.outcomes.load(planned) for planned in self.plan]

    def _tuner(
        self,
        parent_run: str | None,
        search: Any,
        space: dict[str, Any],
        trials: int,
        progress: SweepProgress,
        rule: StopRule,
    ) -> tune.Tuner:
        context = TrialContext(
            self.config,
            self.folder,
            self.tracking_uri,
            parent_run,
            {key: [ray.put(dataset)] for key, dataset in self.datasets.items()},
            [os.getcwd(), *sys.path],
            self.data_dir and self.data_dir.resolve(),
        )
        # Tune sends it to every trial's process: it must not hold the sweep itself.
        reserve = partial(_reserve, self.config)
        return tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, context=context), reserve),
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=trials if search else 1,
                search_alg=search,
                scheduler=self._scheduler(),
                max_concurrent_trials=self.config.concurrent or (self._at_a_time() if search else None),
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name=f"session-{time.time_ns()}",
                storage_path=self._storage_path(),
                failure_config=tune.FailureConfig(max_failures=self.config.retries),
                # In a population a trial may be told to go on from what another has just replaced.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4 if self.evolving else 1),
                stop=rule,
                callbacks=[progress],
                verbose=0,
            ),
        )

    def _storage_path(self) -> str:
        if self.storage is None:
            return str(self.folder / "tune")
        place = self.storage if "://" in self.storage else str(Path(self.storage).resolve())
        return f"{place.rstrip('/')}/{self.config.name}"

    def _search(self) -> tuple[Any, dict[str, Any], int]:
        """Return the searcher (None: the grid that follows), Tune's space, and the number of trials to run."""
        config = self.config
        if isinstance(config.search, OptunaSearchConfig):
            from fedsim.sweep.optuna_search import OptunaPoints

            file = self.folder / "optuna.db"
            search = OptunaPoints(config.parsed_space(), config.objectives, config.seeds, config.search, file)
            return search, {}, (config.budget.trials or 0) - search.finished
        if self.evolving and len(self.outcomes.every()) < len(self.plan):
            shutil.rmtree(self.outcomes.path, ignore_errors=True)
        rest = [
            {"point": planned.point, "seeds": list(planned.seeds)}
            for planned in self.plan
            if not self.outcomes.load(planned).done
        ]
        if self.evolving and self.outcomes.every():
            rest = []
        return None, {"trial": tune.grid_search(rest)}, len(rest)

    def _scheduler(self) -> TrialScheduler:
        scheduler, first = self.config.scheduler, self.config.objectives[0]
        if isinstance(scheduler, AshaConfig):
            points = self.config.parsed_space().corners(grid=True)
            most = max(self._example(p).federation.rounds for p in points) * len(self.config.seeds)
            return AsyncHyperBandScheduler(
                time_attr="round",
                metric=first.metric,
                mode=first.direction,
                # One more than there are rounds: whoever comes to the end still has the last audits before it.
                max_t=most + 1,
                grace_period=min(scheduler.grace_rounds, most),
                reduction_factor=scheduler.reduction_factor,
            )
        if isinstance(scheduler, MedianConfig):
            return MedianStoppingRule(
                time_attr="round", metric=first.metric, mode=first.direction, grace_period=scheduler.grace_rounds
            )
        if isinstance(scheduler, PbtConfig):
            return population(self.config, scheduler)
        return FIFOScheduler()

    def _at_a_time(self) -> int:
        return max(1, int(ray.cluster_resources().get("CPU", 1)) // self.widest)

    def _check_room(self) -> None:
        """See that every trial can be placed, on the cluster as it is.

        Raises:
            ConfigError: If not, with what it needs and what there is.
        """
        if self.config.elastic:
            return
        there = ray.cluster_resources()
        for point in self.config.parsed_space().corners(grid=True):
            runtime = self._example(point).runtime
            for kind, amount in _bundle(runtime).items():
                needs = amount * _workers(runtime)
                if needs > there.get(kind, 0):
                    raise ConfigError(
                        f"{self.config.name}: a trial needs {needs:g} {kind} for {_workers(runtime)} workers, but "
                        f"the cluster has {there.get(kind, 0):g}; lower runtime.workers, or set elastic: true if "
                        "the cluster grows on demand"
                    )

    def _summarise(self, outcomes: list[Outcome], parent: TrackedRun | None) -> None:
        table = self.folder / "trials.csv"
        write_atomically(table, as_frame(outcomes).to_csv(index=False).encode())
        if parent:
            counts = Counter(one.status for one in outcomes)
            parent.metrics({f"trials.{status}": count for status, count in counts.items()}, 0)
            parent.artifact(table)

    def _claim(self) -> None:
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / "sweep.yaml", text.encode())

    def _start(self, tracker: Tracker) -> TrackedRun:
        identity = f"{self.config.fingerprint()[:16]}@{self.folder}"
        tags = {"fedsim.kind": "sweep", "fedsim.name": self.config.name, "fedsim.id": identity}
        parent = tracker.start(self.config.name, tags)
        parent.artifact(self.folder / "sweep.yaml")
        return parent

    def _check_folder(self, resume: bool) -> None:
        def is_same(saved: Path) -> bool:
            return SweepConfig.model_validate(read_yaml(saved)).fingerprint() == self.config.fingerprint()

        check_folder(self.folder, "sweep.yaml", "sweep", is_same, resume)


def _reserve(config: SweepConfig, settings: Mapping[str, Any]) -> tune.PlacementGroupFactory:
    """Reserve for a trial's workers, so that no pending trial can hold what another's workers wait for."""
    settings = settings.get("trial") or {"point": next(config.parsed_space().corners(grid=True))}
    runtime = config.experiment_at(settings["point"], config.seeds[0]).runtime
    return tune.PlacementGroupFactory([{}, *[_bundle(runtime)] * _workers(runtime)])


def _kind(config: ExperimentConfig) -> str:
    """Return all that `prepare` depends on."""
    federation = config.federation
    sizes = (federation.clients, federation.clients_per_round, federation.root_per_class, federation.batch_size)
    return repr((config.data, config.model, sizes, config.audit, bool(config.attacks)))


def _workers(runtime: RuntimeConfig) -> int:
    return 1 if runtime.workers == "auto" else runtime.workers


def _bundle(runtime: RuntimeConfig) -> dict[str, float]:
    """Return what one worker of a trial takes."""
    return {"CPU": 1.0, "GPU": runtime.gpus_per_worker} if ray.cluster_resources().get("GPU") else {"CPU": 1.0}
