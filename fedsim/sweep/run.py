"""A sweep from its plan to its summary: Ray Tune chooses and places the trials."""

import os
import shutil
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import ray
import yaml
from rich.console import Console

from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset, dataset_key, load_dataset
from fedsim.engine.runtime import Cluster
from fedsim.errors import ConfigError
from fedsim.files import check_folder, write_atomically
from fedsim.preparation import check_factories, prepare
from fedsim.settings import read_yaml
from fedsim.sweep.config import OptunaSearchConfig, SweepConfig, check_sweep
from fedsim.sweep.outcomes import Outcome, OutcomeFolder, as_frame
from fedsim.sweep.progress import StopRule, SweepProgress
from fedsim.sweep.resources import check_room, widest
from fedsim.sweep.settle import settle
from fedsim.sweep.trial import TrialContext
from fedsim.sweep.tuning import Tuning
from fedsim.tracking import TrackedRun, Tracker, resolve_uri


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
        self.points = [] if self.adaptive else self.config.points()
        self.datasets: dict[str, Dataset] = {}
        samples = list(self.config.parsed_space().corners(grid=True))
        prepared = set()
        for point in [*samples, *self.points]:
            config = self.config.experiment_at(point, self.config.seeds[0])
            key = dataset_key(config.data)
            if key not in self.datasets:
                self.datasets[key] = load_dataset(config.data, self.data_dir)
            check_factories(config)
            if _kind(config) not in prepared:
                prepared.add(_kind(config))
                prepare(config, self.datasets[key], self.data_dir)

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
            with nullcontext() if self._is_over() else Cluster(self.address, widest(self.config)) as cluster:
                if cluster:
                    check_room(self.config)
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
        tuning = Tuning(self.config, self.folder, self.outcomes, self.plan, self.storage)
        search, space, trials = tuning.search()
        if trials > 0:
            rule = StopRule(self.config)
            progress = SweepProgress(self.config, trials, self.outcomes, rule, self.console)
            with progress.bar:
                tuning.tuner(self._context(parent_run), search, space, trials, progress, rule).fit()
            if progress.done < trials and not rule.over:
                raise KeyboardInterrupt
        if self.adaptive or tuning.evolving:
            return self.outcomes.every()
        return [self.outcomes.load(planned) for planned in self.plan]

    def _context(self, parent_run: str | None) -> TrialContext:
        return TrialContext(
            self.config,
            self.folder,
            self.tracking_uri,
            parent_run,
            {key: [ray.put(dataset)] for key, dataset in self.datasets.items()},
            [os.getcwd(), *sys.path],
            self.data_dir and self.data_dir.resolve(),
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


def _kind(config: ExperimentConfig) -> str:
    """Return all that the rest of `prepare` depends on."""
    federation = config.federation
    sizes = (federation.clients, federation.clients_per_round, federation.root_per_class, federation.batch_size)
    return repr((config.data, config.model, sizes, config.audit, bool(config.attacks)))
