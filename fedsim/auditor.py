"""The audit of one simulation: who is attacked how before which round, and what has been done of it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from fedsim.attacks.strategies import strategies_of
from fedsim.data.datasets import mean_image
from fedsim.data.public import PublicImages
from fedsim.engine.chunks import AttackJob
from fedsim.engine.federation import Federation
from fedsim.engine.lessons import Scope
from fedsim.learning.batches import ImageStore
from fedsim.preparation import Prepared
from fedsim.privacy import audit
from fedsim.privacy.observation import Adversary, LocalTraining, Payload, Victim
from fedsim.progress import Reporter
from fedsim.results import AuditResult, RunFolder, audit_stem


class Auditor:
    """Attacks the victims of the rounds that are to be audited, on a federation's present weights.

    Attributes:
        audits: What was found so far.
    """

    def __init__(
        self, prepared: Prepared, federation: Federation, folder: RunFolder | None, reporter: Reporter
    ) -> None:
        """Audit `federation`; each audit is kept in `folder`, if there is one, and told to `reporter`."""
        self.config, self.victims = prepared.spec.config, prepared.victims
        self.dataset, self.federation = prepared.dataset, federation
        self.folder, self.reporter = folder, reporter
        self.audits: list[AuditResult] = []
        self.public = prepared.public
        self._learned: dict[tuple[int, Scope], tuple[Any, float, str]] = {}
        known = self.config.audit.local_learning_rate == "known"
        self.rate = self.config.federation.learning_rate if known else None

    def reload(self) -> None:
        """Read back what an earlier process has kept."""
        if not self.folder:
            return
        for round_ in self.victims:
            for number, adversary, strategy in self._trials():
                found = self.folder.load_audit(self.config.attacks[number].title, adversary, strategy, round_)
                if found:
                    self.audits.append(found)

    def attack_round(self, round_: int) -> None:
        """Attack the victims of a round, if it is one to be audited, before it changes the weights."""
        victims = self.victims.get(round_)
        if not victims:
            return
        self._learned = {}
        payload = self.federation.probe(round_, victims)
        if self.rate is None:
            payload = payload.moved(self.config.federation.learning_rate)
        truth = audit.GroundTruth.of(self._images(), victims)
        jobs = [
            self._job(number, adversary, strategy, round_, victims, truth)
            for number, adversary, strategy in self._trials()
            if not self._audited(self.config.attacks[number].title, adversary, strategy, round_)
        ]
        for at, job in enumerate(jobs):
            self._learn(jobs[at:], round_)
            self._attack(job, round_, payload, victims, truth)

    def _trials(self) -> list[tuple[int, Adversary, str]]:
        """Return what is tried on the victims of a round: number of the attack, adversary, strategy."""
        audit = self.config.audit
        return [
            (number, adversary, strategy)
            for number in range(len(self.config.attacks))
            for adversary in audit.adversaries
            for strategy in strategies_of(
                self.config.defense, adversary, audit.observations, self.config.attacks[number]
            )
        ]

    def _job(
        self,
        number: int,
        adversary: Adversary,
        strategy: str,
        round_: int,
        victims: tuple[Victim, ...],
        truth: audit.GroundTruth,
    ) -> AttackJob:
        return AttackJob(
            attack=number,
            batch_size=truth.labels.shape[1],
            labels=truth.labels.numpy() if self.config.attacks[number].knows_labels else None,
            seeds=audit.attack_seeds(self.config, round_, len(victims)),
            local=LocalTraining(victims[0].steps, self.rate),
            adversary=adversary,
            strategy=strategy,
        )

    def _attack(
        self, job: AttackJob, round_: int, payload: Payload, victims: tuple[Victim, ...], truth: audit.GroundTruth
    ) -> None:
        attack, adversary, strategy = self.config.attacks[job.attack].title, job.adversary, job.strategy
        learned, seconds, report = self._learned.get(self._lesson(job), (None, 0.0, ""))
        found, seen = self.federation.attack(payload, job, learned)
        at_truth = self.federation.matching_loss(seen, job, truth.images, truth.labels, learned)
        if learned is not None:
            # Told by every attack that uses it, paid for by the first.
            self._learned[self._lesson(job)] = learned, 0.0, report
            found = replace(found, seconds=found.seconds + seconds)
        result = AuditResult(
            attack=attack,
            adversary=adversary,
            strategy=strategy,
            round=round_,
            rows=audit.score(truth, found, at_truth, victims, attack, adversary, strategy, round_, report),
            originals=audit.as_bytes(truth.images),
            reconstructions=audit.as_bytes(found.images),
        )
        self.audits.append(result)
        if self.folder:
            self.folder.save_audit(result)
        self.reporter.note(f"{self.config.name}: {result.describe()}")

    def _lesson(self, job: AttackJob) -> tuple[int, Scope]:
        """Return what tells lessons apart: adversaries and strategies may share one."""
        return job.attack, Scope.of(self.config, job)

    def _learn(self, jobs: Sequence[AttackJob], round_: int) -> None:
        """Let the attack of the first job learn, if it does and has not yet, and some that are next beside it.

        No more than there are workers: who stops a run loses what was learned but not yet used.
        """
        missing: dict[tuple[int, Scope], tuple[AttackJob, PublicImages]] = {}
        for job in jobs:
            source, lesson = self.config.attacks[job.attack].public_source, self._lesson(job)
            if source is not None and lesson not in self._learned:
                missing.setdefault(lesson, (job, self.public[source]))
            elif job is jobs[0]:
                return
        missing = dict(islice(missing.items(), len(self.federation.runtime.pool.workers)))
        for lesson, found in zip(missing, self.federation.learn(list(missing.values()), round_), strict=True):
            self._learned[lesson] = found
            _, seconds, report = found
            if report and seconds:
                knew = " ".join(filter(None, (self.config.attacks[lesson[0]].title, lesson[1].strategy)))
                self.reporter.note(f"{self.config.name}: {knew}: {report}")

    def _audited(self, attack: str, adversary: str, strategy: str, round_: int) -> bool:
        stem = audit_stem(attack, adversary, strategy, round_)
        return any(audit.stem == stem for audit in self.audits)

    def floors(self) -> dict[str, dict[str, float]]:
        """Return how well guesses that know nothing do on all victims; empty if there are none."""
        victims = [victim for those in self.victims.values() for victim in those]
        if not victims:
            return {}
        truth = audit.GroundTruth.of(self._images(), victims)
        return audit.floor_scores(truth, mean_image(self.dataset), self.config.seed)

    def _images(self) -> ImageStore:
        return ImageStore.of(self.dataset.train_images, self.dataset.train_labels, "cpu")
