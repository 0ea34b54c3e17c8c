"""The audit of one simulation: who is attacked how before which round, and what has been done of it."""

from dataclasses import replace
from typing import Any

from fedsim.attacks.strategies import strategies_of
from fedsim.data.datasets import mean_image
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
        self._learned: dict[tuple[int, Scope], tuple[Any, str]] = {}
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
            for strategy in strategies_of(
                self.config.defense, adversary, audit.observations, self.config.attacks[number]
            )
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
            local=LocalTraining(victims[0].steps, self.rate),
            adversary=adversary,
            strategy=strategy,
        )
        learned, report, seconds = self._learn(job, round_)
        found, seen = self.federation.attack(payload, job, learned)
        found = replace(found, seconds=found.seconds + seconds)
        at_truth = self.federation.matching_loss(seen, job, truth.images, truth.labels, learned)
        result = AuditResult(
            attack=settings.title,
            adversary=adversary,
            strategy=strategy,
            round=round_,
            rows=audit.score(truth, found, at_truth, victims, settings.title, adversary, strategy, round_, report),
            originals=audit.as_bytes(truth.images),
            reconstructions=audit.as_bytes(found.images),
        )
        self.audits.append(result)
        if self.folder:
            self.folder.save_audit(result)
        self.reporter.note(f"{self.config.name}: {result.describe()}")

    def _learn(self, job: AttackJob, round_: int) -> tuple[Any, str, float]:
        """Return a reference to what the attack has learned, a line on it, and the seconds that it took.

        What several adversaries or strategies share is learned once, and counts for the first of them; what
        simulations share is told by the first of them. (None, "", 0) if it learns nothing.
        """
        settings = self.config.attacks[job.attack]
        if settings.public_source is None:
            return None, "", 0.0
        key, seconds = (job.attack, Scope.of(self.config, job)), 0.0
        if key not in self._learned:
            images = self.public[settings.public_source]
            learned, seconds, report = self.federation.learn(job, round_, images)
            self._learned[key] = learned, report
            if report and seconds:
                knew = " ".join(filter(None, (settings.title, key[1].strategy)))
                self.reporter.note(f"{self.config.name}: {knew}: {report}")
        return *self._learned[key], seconds

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
