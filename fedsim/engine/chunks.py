"""What a worker computes: one chunk of a round, one shard of an attack, one part of an evaluation. No Ray here."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.aggregation.pairwise import Block, PairwiseSum
from fedsim.attacks import strategies
from fedsim.defenses.base import Public
from fedsim.engine.acceptance import judge
from fedsim.engine.session import Session
from fedsim.learning import batch_norm
from fedsim.learning.batches import Indices, as_tensor
from fedsim.learning.training import LocalResult
from fedsim.privacy.observation import (
    ONE_STEP,
    Adversary,
    Knowledge,
    LocalTraining,
    Observation,
    Payload,
    Reconstruction,
)
from fedsim.randomness import Purpose

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class ChunkTask:
    """One unit of work: clients of one round, in client order."""

    round: int
    clients: tuple[int, ...]


@dataclass(frozen=True)
class ChunkReport:
    """What a worker says about a chunk, beside its partial sum.

    Attributes:
        client_weights: Weight (examples used) of each accepted client, in client order.
        loss: Sum over accepted clients of weight × mean loss.
        rejected: Clients whose updates cannot be used, and why.
        upload_bytes: Bytes that the clients sent, summed.
        local_seconds: Time in local training.
        defense_seconds: Time in the defense.
    """

    client_weights: tuple[float, ...]
    loss: float
    rejected: dict[int, str]
    upload_bytes: float
    local_seconds: float
    defense_seconds: float


@dataclass(frozen=True)
class AttackJob:
    """One attack on one shard of victims.

    Attributes:
        attack: Index of the attack in the experiment.
        batch_size: Images behind each gradient.
        labels: The victims' labels [N, B], only for an attack that is assumed to know them.
        seeds: One seed a victim.
        adversary: What the attacker knows of the defense.
        strategy: What it makes of that; "" is the plain attack.
        local: The local training behind each gradient.
    """

    attack: int
    batch_size: int
    labels: Indices | None
    seeds: tuple[int, ...]
    adversary: Adversary = "naive"
    strategy: str = ""
    local: LocalTraining = ONE_STEP

    def select(self, victims: slice) -> "AttackJob":
        """Return the job for some of the victims."""
        labels = None if self.labels is None else self.labels[victims]
        return replace(self, labels=labels, seeds=self.seeds[victims])


def run_chunks(
    session: Session, weights: Tensor, public: Public, tasks: Sequence[ChunkTask], first: int
) -> tuple[Tensor, tuple[ChunkReport, ...]]:
    """Run neighbouring chunks, the first of which is number `first` of its round, and add what they give.

    Returns:
        Their weighted sum, shape [d + b], and a report each; see `run_chunk`.
    """
    total, reports = PairwiseSum(session.aggregation), []
    for number, task in enumerate(tasks, first):
        partial, report = run_chunk(session, weights, public, task)
        total.push(Block(number, 1), partial)
        reports.append(report)
    return total.total(), tuple(reports)


def run_chunk(session: Session, weights: Tensor, public: Public, task: ChunkTask) -> tuple[Tensor, ChunkReport]:
    """Train and protect the clients of `task`.

    Args:
        session: The simulation.
        weights: Global weights, shape [d].
        public: What the defense published for this round.
        task: The clients.

    Returns:
        Their weighted sum, shape [d + b] (the last b entries are the batch-norm statistics), and a report.
        A client whose update is not finite, or has not the model's size, has no weight.
    """
    start = time.perf_counter()
    schedules = session.spec.schedules(task.round, task.clients)
    result = session.trainer.train(weights, schedules)
    trained = _now(weights.device)
    protected = _protect(session, weights, public, task, schedules, result)
    defended = _now(weights.device)
    sent = judge(protected, result.statistics, session.model.layout.dimension)
    examples = _examples(session, task, schedules)
    used = torch.where(sent.mask, examples.to(weights.device), 0.0)
    report = ChunkReport(
        client_weights=tuple(w for row, w in enumerate(examples.tolist()) if row not in sent.reasons),
        loss=float((torch.where(sent.mask, result.losses, 0.0) * used).sum()),
        rejected={task.clients[row]: reason for row, reason in sorted(sent.reasons.items())},
        upload_bytes=float(session.defense.upload_bytes(sent.updates).sum()) + 4 * result.statistics.numel(),
        local_seconds=trained - start,
        defense_seconds=defended - trained,
    )
    return session.aggregation.partial(sent.rows, used), report


def _protect(
    session: Session,
    weights: Tensor,
    public: Public,
    task: ChunkTask,
    schedules: list[list[Indices]],
    result: LocalResult,
) -> Tensor | Sequence[Tensor]:
    context = session.client_context(
        weights,
        public,
        batches=[schedule[0] for schedule in schedules],
        purpose=Purpose.PROTECTION,
        round_=task.round,
        streams=list(task.clients),
        local_steps=len(schedules[0]),
    )
    return session.defense.protect(result.updates, context)


def _examples(session: Session, task: ChunkTask, schedules: list[list[Indices]]) -> Tensor:
    """Return how many distinct images each client trained on: its weight in the aggregate, shape [K]."""
    held = [len(session.spec.partition.client(client)) for client in task.clients]
    taken = [sum(map(len, schedule)) for schedule in schedules]
    return torch.tensor([float(min(pair)) for pair in zip(held, taken, strict=True)])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def attack(
    session: Session, weights: Tensor, payload: Payload, job: AttackJob, learned: Any = None
) -> tuple[Reconstruction, Payload]:
    """Attack the victims of `payload`, whose gradients were taken at `weights` [d].

    Args:
        session: The simulation.
        weights: Global weights.
        payload: What the victims sent.
        job: How they are attacked.
        learned: What the attack has learned before, if it learns.

    Returns:
        What was found, and the payload as the job's strategy saw it: the loss is measured on that.
    """
    attack = session.spec.config.attacks[job.attack].build().taught(learned)
    observation = strategies.apply(job.strategy, _observation(session, weights, payload, job), attack)
    seen = replace(
        payload,
        gradients=observation.gradients.cpu().numpy(),
        trust=None if observation.trust is None else observation.trust.cpu().numpy(),
        repeats=payload.repeats if job.strategy in strategies.LOOK_BACK else None,
    )
    return strategies.armed(job.strategy, observation, attack).reconstruct(observation).cpu(), seen


def matching_loss(
    session: Session,
    weights: Tensor,
    payload: Payload,
    job: AttackJob,
    images: Tensor,
    labels: Tensor,
    learned: Any = None,
) -> Tensor | None:
    """Return the attack's loss at the private images, shape [N]: for the audit, never for an attack."""
    observation = strategies.transformed(job.strategy, _observation(session, weights, payload, job))
    attack = session.spec.config.attacks[job.attack].build().taught(learned)
    attack = strategies.armed(job.strategy, observation, attack)
    loss = attack.matching_loss(observation, images.to(session.device), labels.to(session.device))
    return None if loss is None else loss.detach().cpu()


def _observation(session: Session, weights: Tensor, payload: Payload, job: AttackJob) -> Observation:
    device = session.device
    return Observation(
        model=session.model,
        weights=weights,
        gradients=as_tensor(payload.gradients, device),
        batch_size=job.batch_size,
        statistics=as_tensor(payload.statistics, device),
        labels=None if job.labels is None else as_tensor(job.labels, device),
        seeds=job.seeds,
        local=job.local,
        trust=None if payload.trust is None else as_tensor(payload.trust, device),
        knowledge=None if job.adversary == "naive" else _knowledge(session, payload, job),
    )


def _knowledge(session: Session, payload: Payload, job: AttackJob) -> Knowledge:
    """Return what an adversary who is not naive knows; the secrets are for the oracle."""
    secrets = payload.secrets if job.adversary == "oracle" else {}
    repeats = payload.gradients[:, None][:, :0] if payload.repeats is None else payload.repeats
    return Knowledge(
        session.spec.config.defense,
        {name: as_tensor(array, session.device) for name, array in payload.public.items()},
        {name: as_tensor(array, session.device) for name, array in secrets.items()},
        as_tensor(repeats, session.device),
        session.spec.config.audit.parameters,
    )


@torch.no_grad()
def evaluate(session: Session, weights: Tensor, statistics: Tensor, start: int, stop: int) -> tuple[int, float]:
    """Return how many of the test images `start` … `stop` are classified right, and their summed loss."""
    module, data = session.model.module, session.test_data
    module.eval()
    batch_norm.load_averages(module, statistics)
    right, loss = 0, 0.0
    for at in range(start, stop, EVALUATION_BATCH):
        images, labels = data.take(np.arange(at, min(stop, at + EVALUATION_BATCH)))
        logits = session.model.logits(weights, images)
        right += int((logits.argmax(dim=1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    module.train()
    return right, loss
