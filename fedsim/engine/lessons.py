"""What a worker computes before an attack: what the attack learns from public images. No Ray here."""

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.attacks.learning import LearningContext
from fedsim.attacks.strategies import REPEATED
from fedsim.config import ExperimentConfig
from fedsim.data.public import PublicImages
from fedsim.defenses.base import Public
from fedsim.engine.chunks import AttackJob
from fedsim.engine.session import Session
from fedsim.learning.batches import ImageStore
from fedsim.privacy.observation import Knowledge
from fedsim.randomness import Purpose, numpy_stream


@dataclass(frozen=True)
class Lesson:
    """What one attack has learned.

    Attributes:
        learned: What `Attack.learn` returned.
        seconds: Time it took.
        report: A line on it, or "".
    """

    learned: Any
    seconds: float
    report: str = ""


@dataclass(frozen=True)
class Scope:
    """What of an adversary a lesson depends on: equal scopes, equal lessons, in one round of one simulation.

    Attributes:
        simulates: Whether it is learned through the defense; if not, it is the same under any defense.
        rounds: Rounds in which the attack will see each victim.
        strategy: What it rehearses; "" is the plain attack, or any that makes no difference.
    """

    simulates: bool
    rounds: int
    strategy: str

    @classmethod
    def of(cls, config: ExperimentConfig, job: AttackJob) -> "Scope":
        """Return the scope of what the attack of `job` learns."""
        settings = config.attacks[job.attack]
        if not settings.learns_through_defense(job.adversary):
            return cls(False, 1, "")
        if settings.rehearses:
            return cls(True, config.audit.observations, job.strategy)
        return cls(True, config.audit.observations if job.strategy in REPEATED else 1, "")


def learn(
    session: Session, weights: Tensor, public: Public, images: PublicImages, job: AttackJob, round_: int
) -> Lesson:
    """Let the attack of `job` learn at `weights` [d], the global weights before `round_`.

    It gets no payload, and of the job nothing that depends on a victim: the same for any victims and shards.
    """
    start, scope = time.perf_counter(), Scope.of(session.spec.config, job)
    attack = session.spec.config.attacks[job.attack].build()
    learned = attack.learn(
        LearningContext(
            model=session.model,
            weights=weights,
            public=ImageStore.of(images.images, images.labels, session.device),
            batch_size=job.batch_size,
            seed=int(numpy_stream(session.spec.config.seed, Purpose.LEARNING, round_).integers(2**62)),
            knowledge=_knowledge(session, weights, public) if scope.simulates else None,
            rounds=scope.rounds,
            local=job.local,
            strategy=scope.strategy,
        )
    )
    return Lesson(learned, time.perf_counter() - start, attack.report(learned))


def shared_key(
    config: ExperimentConfig, weights: NDArray[np.float32], images: PublicImages, job: AttackJob, round_: int
) -> str:
    """Return a digest of all that a lesson depends on which is not learned through the defense."""
    parts = (config.seed, config.model, config.attacks[job.attack], job.batch_size, job.local, round_)
    digest = hashlib.sha256(repr((*parts, images.fingerprint)).encode())
    digest.update(weights.tobytes())
    return digest.hexdigest()


def _knowledge(session: Session, weights: Tensor, public: Public) -> Knowledge:
    """Return what is known of the defense before any victim has sent anything."""
    config = session.spec.config
    return Knowledge(config.defense, public, {}, weights.new_zeros(0, 0, len(weights)), config.audit.parameters)
