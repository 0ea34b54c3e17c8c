"""One simulation: a federation trains under a defense, and attacks audit what its clients send.

The loop is `_Run.train`; start reading there.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.attacks.strategies import strategies_of
from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset, load_dataset, mean_image, root_set
from fedsim.data.partitions import partition
from fedsim.defenses.none import NoDefenseConfig
from fedsim.engine.checkpoints import Checkpoint, CheckpointFolder
from fedsim.engine.chunks import AttackJob
from fedsim.engine.federation import Federation, RoundRecord
from fedsim.engine.overhead import Overhead, measure_overhead
from fedsim.engine.runtime import Runtime
from fedsim.engine.session import SessionSpec
from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore
from fedsim.privacy import audit
from fedsim.privacy.observation import Adversary, LocalTraining, Payload, Victim
from fedsim.progress import Reporter
from fedsim.results import (
    PARTICIPATION_COLUMNS,
    AuditResult,
    RunFolder,
    SimulationResult,
    audit_stem,
    summarize,
)
from fedsim.tracking import TrackedRun, Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a simulation needs before any process starts; making it checks the whole input.

    Attributes:
        dataset: The images.
        spec: The session that workers and server will open.
        victims: The victims of each audited round.
    """

    dataset: Dataset
    spec: SessionSpec
    victims: dict[int, tuple[Victim, ...]]


def prepare(config: ExperimentConfig, dataset: Dataset) -> Prepared:
    """Split the data, build the model once and draw the victims.

    Raises:
        ConfigError: If the data cannot be split so, the model does not fit or no client has enough images.
    """
    federation = config.federation
    root, rest = root_set(dataset, federation.root_per_class, config.seed)
    parts = partition(dataset.train_labels, rest, federation.clients, config.data.partition, config.seed)
    spec = SessionSpec(config, parts, root)
    model = spec.build_model(dataset)
    rounds = config.audit.rounds if config.attacks else ()
    if config.audit.payload == "probe":
        victims = {round_: audit.choose_victims(config, parts, round_) for round_ in rounds}
    else:
        victims = {round_: _training_victims(spec, round_) for round_ in rounds}
    for size in sorted({len(victim.images) for those in victims.values() for victim in those}):
        for attack in config.attacks:
            attack.check(model, size)
    return Prepared(dataset, spec, victims)


def _training_victims(spec: SessionSpec, round_: int) -> tuple[Victim, ...]:
    """Return the first clients of the round's cohort, with the batches that they train on.

    Raises:
        ConfigError: If no client takes part, or none trains on batches of one size, and on no image twice, as
            attacks assume.
    """
    cohort = spec.cohort(round_)[: spec.config.audit.victims]
    if not cohort:
        raise ConfigError(f"audit.payload: training: no client reports in time in round {round_}")
    schedules = {client: spec.schedule(round_, client) for client in cohort}
    images = {client: np.concatenate(batches) for client, batches in schedules.items()}
    able = [c for c in cohort if len(set(map(len, schedules[c]))) == 1 and len(set(images[c])) == len(images[c])]
    if not able:
        raise ConfigError(
            "audit.payload: training needs local batches of one size that use each image once; set "
            f"federation.local_steps × batch_size to at most a client's images ({len(set(images[cohort[0]]))})"
        )
    size = max(len(images[client]) for client in able)
    same = [client for client in able if len(images[client]) == size]
    return tuple(Victim(c, images[c], stream=c, steps=len(schedules[c])) for c in same)


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
        tracker: Tracker | None = None,
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
            tracker: MLflow store to log to; None logs nothing.
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
        self.prepared = prepare(config, dataset or load_dataset(config.data, data_dir))

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
        if self.folder:
            self.folder.claim(self.config)
        tracked = self._start_tracking()
        try:
            result = _Run(self, runtime, tracked).train()
        except BaseException as error:
            if tracked:
                tracked.finish("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        if tracked:
            tracked.result(result, self.folder)
            tracked.finish()
        return result

    def _finished(self, folder: RunFolder) -> SimulationResult:
        """Read a finished run back, and log it if an interruption came between its end and MLflow's."""
        result = folder.load_result()
        if self.tracker and not self.tracker.has_finished(self._identity):
            tracked = self._start_tracking()
            assert tracked
            for record in result.history:
                tracked.round(record)
            tracked.result(result, folder)
            tracked.finish()
        return result

    @property
    def _identity(self) -> str:
        place = str(self.folder.path.resolve()) if self.folder else "memory"
        return f"{self.config.fingerprint()[:16]}@{place}"

    def _start_tracking(self) -> TrackedRun | None:
        if not self.tracker:
            return None
        tags = {"fedsim.kind": "run", "fedsim.name": self.config.name, **self.tags, "fedsim.id": self._identity}
        tracked = self.tracker.start(self.config.name, tags, self.parent)
        tracked.params(self.config.to_dict())
        tracked.dataset(self.prepared.dataset, self.config.data.name)
        return tracked


class _Run:
    """One pass through a simulation, from its start or its newest checkpoint."""

    def __init__(self, simulation: Simulation, runtime: Runtime, tracked: TrackedRun | None) -> None:
        self.config, self.folder = simulation.config, simulation.folder
        self.dataset, self.spec = simulation.prepared.dataset, simulation.prepared.spec
        self.victims = simulation.prepared.victims
        self.runtime, self.tracked, self.reporter = runtime, tracked, simulation.reporter
        self.checkpoints = (
            CheckpointFolder(self.folder.checkpoints, self.config.fingerprint()) if self.folder else None
        )
        checkpoint = self.checkpoints.latest() if self.checkpoints else None
        self.history: list[dict[str, Any]] = checkpoint.history if checkpoint else []
        self.saved = len(self.history)
        self.federation = Federation(
            self.spec, self.dataset, runtime, checkpoint.state if checkpoint else None, self.saved
        )
        self.audits: list[AuditResult] = []

    def train(self) -> SimulationResult:
        """Train, evaluate and audit; return the result."""
        rounds = self.config.federation.rounds
        self.reporter.begin(self.config.name, rounds, done=len(self.history))
        try:
            self._reload_audits()
            self._log_history()
            for round_ in range(len(self.history), rounds):
                self.audit_round(round_)
                record = self._as_record(self.federation.run_round(round_))
                if self._due(round_, self.config.federation.evaluate_every):
                    record["ACC"], record["test_loss"] = self.federation.evaluate()
                self._note(record)
                if self._due(round_, self.config.checkpoint_every):
                    self._checkpoint()
                self.reporter.round(record)
            self.audit_round(rounds)
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

    def _log_history(self) -> None:
        """Log the checkpoint's rounds that had not come to MLflow when the process before this one died."""
        if self.tracked:
            for record in self.history:
                self.tracked.round(record)

    def audit_round(self, round_: int) -> None:
        """Attack the victims of a round, if it is one to be audited, before it changes the weights."""
        victims = self.victims.get(round_)
        if not victims:
            return
        payload = self.federation.probe(round_, victims)
        truth = audit.GroundTruth.of(self._images(), victims)
        for number, adversary, strategy in self._trials():
            if not self._audited(self.config.attacks[number].title, adversary, strategy, round_):
                self._attack(number, adversary, strategy, round_, payload, victims, truth)

    def _trials(self) -> list[tuple[int, Adversary, str]]:
        """Return what is tried on the victims of a round: number of the attack, adversary, strategy."""
        audit = self.config.audit
        return [
            (number, adversary, strategy)
            for number in range(len(self.config.attacks))
            for adversary in audit.adversaries
            for strategy in strategies_of(self.config.defense, adversary, audit.observations)
        ]

    def _attack(
        self,
        number: int,
        adversary: Adversary,
        strategy: str,
        round_: int,
        payload: Payload,
        victims: tuple[Victim, ...],
        truth: audit.GroundTruth,
    ) -> None:
        settings = self.config.attacks[number]
        job = AttackJob(
            attack=number,
            batch_size=truth.labels.shape[1],
            labels=truth.labels.numpy() if settings.knows_labels else None,
            seeds=audit.attack_seeds(self.config, round_, len(victims)),
            local=LocalTraining(victims[0].steps, self.config.federation.learning_rate),
            adversary=adversary,
            strategy=strategy,
        )
        found, seen = self.federation.attack(payload, job)
        at_truth = self.federation.matching_loss(seen, job, truth.images, truth.labels)
        result = AuditResult(
            attack=settings.title,
            adversary=adversary,
            strategy=strategy,
            round=round_,
            rows=audit.score(truth, found, at_truth, victims, settings.title, adversary, strategy, round_),
            originals=audit.as_bytes(truth.images),
            reconstructions=audit.as_bytes(found.images),
        )
        self.audits.append(result)
        if self.folder:
            self.folder.save_audit(result)
        self.reporter.note(f"{self.config.name}: {result.describe()}")

    def _audited(self, attack: str, adversary: str, strategy: str, round_: int) -> bool:
        stem = audit_stem(attack, adversary, strategy, round_)
        return any(audit.stem == stem for audit in self.audits)

    def _reload_audits(self) -> None:
        if not self.folder:
            return
        for round_ in self.victims:
            for number, adversary, strategy in self._trials():
                found = self.folder.load_audit(self.config.attacks[number].title, adversary, strategy, round_)
                if found:
                    self.audits.append(found)

    def _images(self) -> ImageStore:
        return ImageStore.of(self.dataset.train_images, self.dataset.train_labels, "cpu")

    def _due(self, round_: int, every: int) -> bool:
        done = round_ + 1
        return done % every == 0 or done == self.config.federation.rounds

    def _note(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self.tracked:
            self.tracked.round(record)

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
            state = Checkpoint(len(self.history), self.federation.state(), self.history)
            self.reporter.saved(self.checkpoints.save(state))
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

    def _finish(self, overhead: Overhead | None) -> SimulationResult:
        floors = {}
        if self.victims:
            mean = mean_image(self.dataset)
            victims = [victim for round_ in self.victims.values() for victim in round_]
            truth = audit.GroundTruth.of(self._images(), victims)
            floors = audit.floor_scores(truth, mean, self.config.seed)
        result = summarize(
            self.config,
            self.history,
            self.audits,
            self.federation.weights(),
            floors,
            overhead,
            self.federation.faults,
            self.federation.execution,
        )
        if self.folder:
            self.folder.save_result(result)
        return result


def _named(rejected: Mapping[int, str], most: int = 8) -> str:
    """Return the clients with what was wrong with each, up to `most` of them."""
    shown = "; ".join(f"client {client}, {reason}" for client, reason in list(rejected.items())[:most])
    return shown if len(rejected) <= most else f"{shown}; and {len(rejected) - most} more"
