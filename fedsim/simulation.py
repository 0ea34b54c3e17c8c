"""One simulation: a federation trains under a defense, and attacks audit what its clients send.

The loop is `_Run.train`; start reading there.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsim.auditor import Auditor
from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset, load_dataset
from fedsim.defenses.none import NoDefenseConfig
from fedsim.engine.checkpoints import Checkpoint, CheckpointFolder
from fedsim.engine.federation import Federation
from fedsim.engine.overhead import Overhead, measure_overhead
from fedsim.engine.pool import Faults
from fedsim.engine.rounds import RoundRecord
from fedsim.engine.runtime import Runtime
from fedsim.engine.session import SessionSpec
from fedsim.preparation import prepare
from fedsim.progress import Reporter
from fedsim.results import (
    PARTICIPATION_COLUMNS,
    RunFolder,
    SimulationResult,
    summarize,
)
from fedsim.tracking import TrackedRun, Tracker

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 10
"""How long a run that has failed or was interrupted tries to tell MLflow; a resume logs what did not get there."""


class Simulation:
    """One experiment, run on Ray.

    A simulation given no runtime starts a private one and stops it; several can share one.

        result = Simulation(ExperimentConfig(defense={"name": "gc", "prune": 0.7})).run()
        result.accuracy, result.rounds, result.images
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        output: Path | str | None = None,
        data_dir: Path | None = None,
        dataset: Dataset | None = None,
        runtime: Runtime | None = None,
        address: str | None = None,
        tracker: Tracker | Callable[[], Tracker] | None = None,
        parent: TrackedRun | None = None,
        tags: Mapping[str, str] | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        """Load the data and check that the experiment can run; nothing is started yet.

        Args:
            config: The experiment.
            output: Folder for its files; None keeps everything in memory.
            data_dir: Where data sets lie, in torchvision's layout.
            dataset: The data, when the caller has loaded it already.
            runtime: Ray runtime to run on.
            address: Ray cluster for a runtime of its own; None: this machine.
            tracker: MLflow store to log to, or what opens it while the workers start; None logs nothing.
            parent: MLflow run that this one is a child of.
            tags: More tags for the MLflow run.
            reporter: Told about progress.

        Raises:
            ConfigError: If anything in the input is wrong.
        """
        self.config, self.runtime, self.address = config, runtime, address
        self.folder = RunFolder(Path(output)) if output is not None else None
        self.tracker, self.parent, self.tags = tracker, parent, dict(tags or {})
        self.reporter = reporter or Reporter()
        self.prepared = prepare(config, dataset or load_dataset(config.data, data_dir), data_dir)

    def check_output(self, resume: bool) -> None:
        """See that the output folder is free for this experiment; ConfigError says why not."""
        if self.folder:
            self.folder.check(self.config, resume)

    def run(self, resume: bool = False) -> SimulationResult:
        """Run to the end, or go on from the newest checkpoint; a finished run is only read back.

        Raises:
            ConfigError: If the output folder holds something else, or this run and `resume` is false.
            RunError: If it fails while running; checkpoints and audits done so far are kept.
        """
        self.check_output(resume)
        if self.folder and self.folder.finished() is not None:
            return self._finished(self.folder)
        if self.runtime:
            return self._run_tracked(self.runtime)
        with Runtime(self.config.runtime, self.address) as runtime:
            return self._run_tracked(runtime)

    def _run_tracked(self, runtime: Runtime) -> SimulationResult:
        tracker = self._open_tracker()
        if self.folder:
            self.folder.claim(self.config)
        tracked = self._start_tracking(tracker) if tracker else None
        try:
            result = _Run(self, runtime, tracked).train()
        except BaseException as error:
            if tracked:
                _finish_quietly(tracked, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        if tracked:
            tracked.result(result, self.folder)
            tracked.finish()
        return result

    def _finished(self, folder: RunFolder) -> SimulationResult:
        """Read a finished run back, and log it if an interruption came between its end and MLflow's."""
        result = folder.load_result()
        tracker = self._open_tracker()
        if tracker and not tracker.has_finished(self._identity):
            tracked = self._start_tracking(tracker)
            for record in result.history:
                tracked.round(record)
            tracked.result(result, folder)
            tracked.finish()
        return result

    @property
    def _identity(self) -> str:
        place = str(self.folder.path.resolve()) if self.folder else "memory"
        return f"{self.config.fingerprint()[:16]}@{place}"

    def _open_tracker(self) -> Tracker | None:
        """Return the MLflow store; ConfigError says why it cannot be opened."""
        return self.tracker() if callable(self.tracker) else self.tracker

    def _start_tracking(self, tracker: Tracker) -> TrackedRun:
        tags = {"fedsim.kind": "run", "fedsim.name": self.config.name, **self.tags, "fedsim.id": self._identity}
        tracked = tracker.start(self.config.name, tags, self.parent)
        tracked.params(self.config.to_dict())
        tracked.dataset(self.prepared.dataset, self.config.data.name)
        return tracked


class _Run:
    """One pass through a simulation, from its start or its newest checkpoint."""

    def __init__(self, simulation: Simulation, runtime: Runtime, tracked: TrackedRun | None) -> None:
        self.config, self.folder = simulation.config, simulation.folder
        self.dataset, self.spec = simulation.prepared.dataset, simulation.prepared.spec
        self.runtime, self.tracked, self.reporter = runtime, tracked, simulation.reporter
        self.checkpoints = (
            CheckpointFolder(self.folder.checkpoints, self.config.fingerprint()) if self.folder else None
        )
        checkpoint = self.checkpoints.latest() if self.checkpoints else None
        before = checkpoint or Checkpoint(0, {}, [])
        self.history, self.saved = before.history, len(before.history)
        self.faults_before, self.by_wire_before = before.faults, before.rounds_by_wire
        self.federation = Federation(self.spec, self.dataset, runtime, before.state or None, self.saved)
        self.auditor = Auditor(simulation.prepared, self.federation, self.folder, self.reporter)

    def train(self) -> SimulationResult:
        """Train, evaluate and audit; return the result."""
        rounds = self.config.federation.rounds
        self.reporter.begin(self.config.name, rounds, done=len(self.history))
        try:
            self.auditor.reload()
            self._evaluate()
            self._log(self.history)
            for round_ in range(len(self.history), rounds):
                self.auditor.attack_round(round_)
                self.history.append(self._as_record(self.federation.run_round(round_)))
                self._evaluate()
                self._log(self.history[-1:])
                if self._due(round_, self.config.checkpoint_every):
                    self._checkpoint()
                self.reporter.round(self.history[-1])
            self.auditor.attack_round(rounds)
            return self._finish(self._overhead())
        except (Exception, KeyboardInterrupt):
            self._rescue()
            raise
        finally:
            self.federation.close()

    def _rescue(self) -> None:
        """Save the rounds since the last checkpoint, unless the interruption came between weights and record."""
        if self.federation.rounds_done == len(self.history) != self.saved:
            try:
                self._checkpoint()
            except Exception as error:  # whatever it is, the first error is the one to tell
                log.warning("the rounds after %d are lost: %s", self.saved, error)

    def _evaluate(self) -> None:
        """Evaluate the present weights if that is due and not done: an interruption may have come before it."""
        newest = self.history[-1] if self.history else None
        if newest and "ACC" not in newest and self._due(newest["round"], self.config.federation.evaluate_every):
            newest["ACC"], newest["test_loss"] = self.federation.evaluate()

    def _log(self, records: Sequence[dict[str, Any]]) -> None:
        """Log those rounds that MLflow does not have: of a checkpoint's it may lack some, or hold later ones."""
        if self.tracked:
            for record in records:
                self.tracked.round(record)

    def _due(self, round_: int, every: int) -> bool:
        done = round_ + 1
        return done % every == 0 or done == self.config.federation.rounds

    def _as_record(self, outcome: RoundRecord) -> dict[str, Any]:
        if outcome.rejected:
            self.reporter.note(f"{self.config.name}: round {outcome.round}: left out: {_named(outcome.rejected)}")
        record = asdict(outcome)
        record["clients_rejected"] = len(record.pop("rejected"))
        if self.config.federation.everyone_reports:
            for name in PARTICIPATION_COLUMNS:
                del record[name]
        return {name: value for name, value in record.items() if value is not None}

    def _checkpoint(self) -> None:
        if self.checkpoints:
            state, (faults, by_wire) = self.federation.state(), self._tally()
            self.reporter.saved(
                self.checkpoints.save(Checkpoint(len(self.history), state, self.history, faults, by_wire))
            )
            self.saved = len(self.history)

    def _overhead(self) -> Overhead | None:
        pairs = self.config.overhead_pairs
        if not pairs or isinstance(self.config.defense, NoDefenseConfig):
            return None
        bare = self.config.model_copy(update={"defense": NoDefenseConfig()})
        plain_spec = SessionSpec(bare, self.spec.partition, self.spec.root)
        plain = Federation(plain_spec, self.dataset, self.runtime)
        defended = Federation(self.spec, self.dataset, self.runtime)
        try:
            return measure_overhead(plain, defended, self.config.federation.rounds + 1, pairs)
        finally:
            plain.close()
            defended.close()

    def _tally(self) -> tuple[Faults, int]:
        """Return the faults, and how many rounds wires carried, also in the processes before this one."""
        by_wire = self.by_wire_before + self.federation.rounds_by_wire
        return self.faults_before.plus(self.federation.faults), by_wire

    def _finish(self, overhead: Overhead | None) -> SimulationResult:
        faults, by_wire = self._tally()
        result = summarize(
            self.config,
            self.history,
            self.auditor.audits,
            self.federation.weights(),
            self.auditor.floors(),
            overhead,
            faults,
            self.federation.execution,
            "wires" if by_wire else "calls",
        )
        if self.folder:
            self.folder.save_result(result)
        return result


def _finish_quietly(tracked: TrackedRun, status: str) -> None:
    """End a run in MLflow after an error: that is the one to tell, and soon, whatever MLflow says."""
    try:
        tracked.finish(status, patience=LAST_WORDS_SECONDS)
    except Exception as error:
        log.warning("the run's end is not in MLflow: %s", error)


def _named(rejected: Mapping[int, str], most: int = 8) -> str:
    """Return the clients with what was wrong with each, up to `most` of them."""
    shown = "; ".join(f"client {client}, {reason}" for client, reason in list(rejected.items())[:most])
    return shown if len(rejected) <= most else f"{shown}; and {len(rejected) - most} more"
