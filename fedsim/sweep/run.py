"""Runs a sweep on Ray Tune: what the trials share, how they end, and going on after an interruption."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from fedsim.config import ExperimentConfig, TrackingConfig, read_yaml
from fedsim.data.datasets import Dataset, dataset_key, load_dataset
from fedsim.engine.checkpoints import write_atomically
from fedsim.engine.runtime import start_ray, stop_ray
from fedsim.errors import ConfigError
from fedsim.results import write_json
from fedsim.simulation import prepare
from fedsim.sweep import placement
from fedsim.sweep.config import SweepConfig
from fedsim.sweep.outcome import Outcome, summary, table
from fedsim.sweep.plan import SweepPlan, Trial
from fedsim.sweep.search import Ledger, TrialQueue
from fedsim.sweep.trial import Shared, Tracking, run_trial
from fedsim.sweep.view import SweepView
from fedsim.tracking import TrackedRun, Tracker, resolve_uri

TUNE_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # The ledger and the trials' folders are the state: Tune's own snapshots would only cost time.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass
class Sweep:
    """A checked sweep with its data.

    Attributes:
        plan: The sweep.
        root: Output root; the sweep's folder is `root / name`.
        data_dir: Where data sets lie.
        address: Ray cluster; None: this machine.
    """

    plan: SweepPlan
    root: Path
    data_dir: Path | None = None
    address: str | None = None
    datasets: dict[str, Dataset] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Load the data and prepare one simulation of each kind; nothing is started.

        Raises:
            ConfigError: If the data are not there or cannot be split so.
        """
        seen = set()
        for config in self.plan.samples():
            key = dataset_key(config.data)
            if key not in self.datasets:
                self.datasets[key] = load_dataset(config.data, self.data_dir)
            kind = _kind(config)
            if kind not in seen:
                seen.add(kind)
                prepare(config, self.datasets[key])
        if self.address is None:
            placement.check(self.requests(), placement.this_machine())

    @property
    def config(self) -> SweepConfig:
        """What the sweep file says."""
        return self.plan.config

    @property
    def folder(self) -> Path:
        """Where the sweep is kept, absolute: Tune changes the working directory of trials."""
        return (self.root / self.config.name).resolve()

    def requests(self) -> list[placement.Request]:
        """Return what trials ask for, each kind once."""
        return sorted({placement.request(config.runtime) for config in self.plan.samples()})

    def run(self, view: SweepView, resume: bool = False) -> list[Outcome]:
        """Run the trials that have not ended; return how all of them ended.

        Raises:
            ConfigError: If the folder holds another sweep, or this one and `resume` is false; if the cluster or
                MLflow cannot be reached; if a trial asks for more than there is.
        """
        self._check_folder(resume)
        tracker = self._tracker()
        os.environ.update(TUNE_SETTINGS)
        temporary = start_ray(self.address, placement.this_machine().cpus, log_to_driver=False)
        parent, status = None, "KILLED"
        try:
            placement.check(self.requests(), placement.of_ray())
            self._claim()
            parent = self._start(tracker) if tracker else None
            outcomes = self._run_trials(view, tracker, parent)
            status = "FAILED" if any(one.state == "failed" for one in outcomes) else "FINISHED"
            self._write(outcomes, parent)
            return outcomes
        finally:
            stop_ray(temporary)
            shutil.rmtree(self.folder / "tune", ignore_errors=True)
            if tracker and parent:
                settle(tracker, parent, self.outcomes())
                parent.finish(status)

    def outcomes(self) -> list[Outcome]:
        """Return how the trials ended that have ended."""
        ledger = Ledger(self.folder)
        found = [Outcome.load(trial, ledger.trial_folder(trial)) for trial, _ in ledger.trials()]
        return [outcome for outcome in found if outcome]

    def _run_trials(self, view: SweepView, tracker: Tracker | None, parent: TrackedRun | None) -> list[Outcome]:
        before = [outcome for outcome in self.outcomes() if outcome.state != "failed"]
        ledger = Ledger(self.folder)
        queue = TrialQueue(self.plan, ledger, before)
        shared = Shared(self.plan, str(self.folder / "trials"), self._put(), self._tracking(tracker, parent))
        gpus = placement.of_ray().gpus > 0

        def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
            experiment = self.plan.experiment(
                Trial(config["trial"], config["point"], config["seed"], config["values"])
            )
            return placement.request(experiment.runtime).group(gpus)

        trainable = tune.with_resources(tune.with_parameters(run_trial, shared=shared), resources)
        view.known(before)
        with view:
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=queue,
                    scheduler=make_scheduler(self.plan),
                    num_samples=-1,
                    max_concurrent_trials=self.config.concurrent,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(self.folder),
                    stop=self._stops,
                    failure_config=tune.FailureConfig(max_failures=self.config.retries),
                    callbacks=[Watch(view, ledger)],
                    verbose=0,
                ),
            ).fit()
        return self.outcomes()

    def _stops(self, _: str, result: dict[str, Any]) -> bool:
        return any(bound.met(result.get(name)) for name, bound in self.config.stop.items())

    def _put(self) -> dict[str, tuple[str, Any]]:
        return {key: (dataset.fingerprint, ray.put(dataset)) for key, dataset in self.datasets.items()}

    def _tracker(self) -> Tracker | None:
        tracking = TrackingConfig.model_validate(self.plan.base.get("tracking", {}))
        if tracking.uri == "off":
            return None
        uri = resolve_uri(tracking.uri, self.root)
        return Tracker(uri, tracking.experiment, self.root / "mlartifacts")

    def _tracking(self, tracker: Tracker | None, parent: TrackedRun | None) -> Tracking | None:
        if not (tracker and parent):
            return None
        experiment = TrackingConfig.model_validate(self.plan.base.get("tracking", {})).experiment
        return Tracking(tracker.uri, experiment, str((self.root / "mlartifacts").resolve()), parent.run_id)

    def _start(self, tracker: Tracker) -> TrackedRun:
        identity = f"{self.config.fingerprint()[:16]}@{self.folder}"
        tags = {"fedsim.kind": "sweep", "fedsim.name": self.config.name, "fedsim.id": identity}
        parent = tracker.start(self.config.name, tags)
        parent.artifact(self.folder / "sweep.yaml")
        return parent

    def _check_folder(self, resume: bool) -> None:
        saved = self.folder / "sweep.yaml"
        if saved.exists():
            other = SweepConfig.model_validate(read_yaml(saved))
            if other.fingerprint() != self._resolved().fingerprint():
                raise ConfigError(f"{self.folder} holds another sweep; choose another name or --output")
            if not resume:
                raise ConfigError(f"{self.folder} holds this sweep already; --resume goes on with it")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and holds no sweep; choose another name or --output")

    def _resolved(self) -> SweepConfig:
        """Return the sweep with the base experiment in it, in place of the name of a file."""
        return self.config.model_copy(update={"experiment": self.plan.base})

    def _claim(self) -> None:
        data = self._resolved().model_dump(mode="json")
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / "sweep.yaml", text.encode())

    def _write(self, outcomes: list[Outcome], parent: TrackedRun | None) -> None:
        files = (self.folder / "summary.json", self.folder / "trials.csv")
        write_json(files[0], summary(outcomes, self.config))
        write_atomically(files[1], table(outcomes).to_csv(index=False).encode())
        if parent:
            for file in files:
                parent.artifact(file)


def _kind(config: ExperimentConfig) -> str:
    """Return what `prepare` looks at, as text."""
    federation = config.federation
    parts = (config.data, config.model, federation.clients, federation.root_per_class, config.audit, config.seed)
    return repr((parts, [attack.name for attack in config.attacks]))


def make_scheduler(plan: SweepPlan) -> TrialScheduler:
    """Return the scheduler that the sweep names."""
    scheduler = plan.config.scheduler
    if scheduler.name == "fifo":
        return FIFOScheduler()
    common = {"time_attr": "round", "metric": scheduler.metric, "mode": scheduler.mode}
    if scheduler.name == "median":
        return MedianStoppingRule(
            **common,
            grace_period=scheduler.grace_rounds,
            min_samples_required=scheduler.min_trials,
            hard_stop=True,
        )
    most = max(config.federation.rounds for config in plan.samples())
    # One more than there are rounds: a trial that has reached the end still has its final audits before it.
    return ASHAScheduler(
        **common,
        grace_period=min(scheduler.grace_rounds, most),
        reduction_factor=scheduler.reduction,
        max_t=most + 1,
    )


class Watch(tune.Callback):  # type: ignore[misc]
    """Writes down how trials end, and tells the view."""

    def __init__(self, view: SweepView, ledger: Ledger) -> None:
        """Watch for `view`; outcomes go into the trials' folders."""
        self._view, self._ledger = view, ledger

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Redraw."""
        self._view.tick()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `SweepView.started`."""
        self._view.started(_trial(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `SweepView.restarted`."""
        self._view.restarted(_trial(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself, or a scheduler ended it."""
        result = trial.last_result or {}
        if "failure" in result:
            self._end(Outcome(_trial(trial), "failed", reason=str(result["failure"])))
            return
        metrics = {name: value for name, value in result.items() if _is_metric(name, value)}
        self._end(Outcome(_trial(trial), "done" if "ART" in metrics else "stopped", metrics))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died more often than it may."""
        error = trial.get_pickled_error() or trial.get_error()
        last = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        self._end(Outcome(_trial(trial), "failed", reason=f"its process died {trial.num_failures} times: {last}"))

    def _end(self, outcome: Outcome) -> None:
        outcome.save(self._ledger.trial_folder(outcome.trial))
        self._view.finished(outcome)


_TUNES_OWN = frozenset({"timestamp", "pid", "time_this_iter_s", "time_total_s", "time_since_restore"})


def _is_metric(name: str, value: object) -> bool:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return (
        numeric
        and name not in _TUNES_OWN
        and not name.startswith(("config", "iterations_", "training_", "warmup"))
    )


def _trial(tune_trial: Any) -> Trial:
    config = tune_trial.config
    return Trial(config["trial"], config["point"], config["seed"], config["values"])


def settle(tracker: Tracker, parent: TrackedRun, outcomes: list[Outcome]) -> None:
    """Give the MLflow runs of trials that were ended from outside the status and the tag of their end."""
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status != 'FINISHED'"
    runs: dict[str, str] = {}
    token = None
    while True:
        page = tracker.client.search_runs([tracker.experiment_id], query, page_token=token)
        runs |= {run.data.tags["fedsim.trial"]: run.info.run_id for run in page}
        token = page.token
        if not token:
            break
    ended = {outcome.trial.title: outcome for outcome in outcomes}
    for title, run_id in runs.items():
        outcome, run = ended.get(title), TrackedRun(tracker, run_id)
        if outcome is None:
            run.finish("KILLED")
        elif outcome.state == "stopped":
            run.tags({"fedsim.stopped": str(int(outcome.metrics.get("round", 0)))})
            run.finish()
        elif outcome.state == "failed":
            run.tags({"fedsim.reason": outcome.reason[:5000]})
            run.finish("FAILED")
