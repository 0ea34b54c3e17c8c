"""What a worker computes: one chunk of a round, one probe of victims, one part of an evaluation. No Ray here."""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad_and_value
from torch.nn import functional as F

from fedsim.attacks import strategies
from fedsim.defenses.base import Public
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
    Victim,
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
        rejected: Clients whose update was not finite.
        upload_bytes: Bytes that the clients sent, summed.
        local_seconds: Time in local training.
        defense_seconds: Time in the defense.
    """

    client_weights: tuple[float, ...]
    loss: float
    rejected: tuple[int, ...]
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


def run_chunk(session: Session, weights: Tensor, public: Public, task: ChunkTask) -> tuple[Tensor, ChunkReport]:
    """Train and protect the clients of `task`.

    Args:
        session: The simulation.
        weights: Global weights, shape [d].
        public: What the defense published for this round.
        task: The clients.

    Returns:
        Their weighted sum, shape [d + b] (the last b entries are the batch-norm statistics), and a report.
        A client whose update is not finite has no weight.
    """
    start = time.perf_counter()
    schedules = [session.spec.schedule(task.round, client) for client in task.clients]
    result = session.trainer.train(weights, schedules)
    trained = _now(weights.device)
    protected = _protect(session, weights, public, task, schedules, result)
    defended = _now(weights.device)
    finite = protected.isfinite().all(dim=1) & result.statistics.isfinite().all(dim=1)
    examples = _examples(session, task, schedules).to(weights.device)
    used = torch.where(finite, examples, 0.0)
    rows = torch.cat([protected, result.statistics], dim=1)
    if not bool(finite.all()):
        rows = torch.where(finite[:, None], rows, 0.0)
    accepted = finite.tolist()
    report = ChunkReport(
        client_weights=tuple(w for w, ok in zip(examples.tolist(), accepted, strict=True) if ok),
        loss=float((torch.where(finite, result.losses, 0.0) * used).sum()),
        rejected=tuple(c for c, ok in zip(task.clients, accepted, strict=True) if not ok),
        upload_bytes=float(session.defense.upload_bytes(protected).sum()) + 4 * result.statistics.numel(),
        local_seconds=trained - start,
        defense_seconds=defended - trained,
    )
    return session.aggregation.partial(rows, used), report


def _protect(
    session: Session,
    weights: Tensor,
    public: Public,
    task: ChunkTask,
    schedules: list[list[Indices]],
    result: LocalResult,
) -> Tensor:
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


def probe(session: Session, weights: Tensor, public: Public, round_: int, victims: tuple[Victim, ...]) -> Payload:
    """Return what victims send when each protects the gradient of its images at `weights` [d].

    With `audit.payload: training` the victims' images are those of their batch in `round_` and their private
    randomness is that of the training round, so that the payload is the very update they contribute.
    """
    training = session.spec.config.audit.payload == "training"
    purpose = Purpose.PROTECTION if training else Purpose.PROBE_PROTECTION
    streams = [victim.stream for victim in victims]
    schedules = [np.split(victim.images, victim.steps) for victim in victims]
    steps = len(schedules[0])
    if steps == 1:
        updates, statistics = _batch_gradients(session, weights, [batch for (batch,) in schedules])
    else:
        result = session.trainer.train(weights, schedules)
        updates, statistics = result.updates, result.statistics
    batches = [schedule[0] for schedule in schedules]
    context = session.client_context(weights, public, batches, purpose, round_, streams, local_steps=steps)
    protected = session.defense.protect(updates, context)
    # A context of its own: its streams start afresh, so that the same draws are made again.
    secrets = session.defense.secrets(
        session.client_context(weights, public, batches, purpose, round_, streams, local_steps=steps)
    )
    return Payload(
        session.aggregation.visible(protected).detach().cpu().numpy(),
        statistics.cpu().numpy(),
        _repeats(session, weights, public, round_, victims, updates),
        {name: tensor.cpu().numpy() for name, tensor in public.items()},
        {name: tensor.cpu().numpy() for name, tensor in secrets.items()},
    )


def _batch_gradients(session: Session, weights: Tensor, batches: list[Indices]) -> tuple[Tensor, Tensor]:
    """Return the gradients [N, d] of N batches, and the batch-norm statistics [N, b] that they showed."""
    model = session.model

    def loss(at: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, statistics = model.logits_and_statistics(at, images)
        return F.cross_entropy(logits, labels), statistics

    gradients, statistics = [], []
    for batch in batches:
        images, labels = session.train_data.take(batch)
        gradient, (_, seen) = grad_and_value(loss, has_aux=True)(weights, images, labels)
        gradients.append(gradient)
        statistics.append(seen.detach())
    return torch.stack(gradients), torch.stack(statistics)


def _repeats(
    session: Session,
    weights: Tensor,
    public: Public,
    round_: int,
    victims: tuple[Victim, ...],
    gradients: Tensor,
) -> NDArray[np.float32]:
    """Return the victims' gradients [N, d] protected again with fresh draws, shape [N, R − 1, d]."""
    repeats = session.spec.config.audit.observations - 1
    seen = gradients.new_empty(len(gradients), repeats, gradients.shape[1])
    for repeat in range(repeats):
        streams = [victim.stream * repeats + repeat for victim in victims]
        batches = [np.split(victim.images, victim.steps)[0] for victim in victims]
        context = session.client_context(
            weights, public, batches, Purpose.PROBE_REPEATS, round_, streams, local_steps=victims[0].steps
        )
        seen[:, repeat] = session.aggregation.visible(session.defense.protect(gradients, context))
    return np.asarray(seen.detach().cpu().numpy(), dtype=np.float32)


def attack(session: Session, weights: Tensor, payload: Payload, job: AttackJob) -> tuple[Reconstruction, Payload]:
    """Attack the victims of `payload`, whose gradients were taken at `weights` [d].

    Returns:
        What was found, and the payload as the job's strategy saw it: the loss is measured on that.
    """
    attack = session.spec.config.attacks[job.attack].build()
    observation = strategies.apply(job.strategy, _observation(session, weights, payload, job), attack)
    seen = replace(
        payload,
        gradients=observation.gradients.cpu().numpy(),
        trust=None if observation.trust is None else observation.trust.cpu().numpy(),
        repeats=payload.repeats if job.strategy in strategies.REMATCHED else None,
    )
    return strategies.armed(job.strategy, observation, attack).reconstruct(observation).cpu(), seen


def matching_loss(
    session: Session, weights: Tensor, payload: Payload, job: AttackJob, images: Tensor, labels: Tensor
) -> Tensor | None:
    """Return the attack's loss at the private images, shape [N]: for the audit, never for an attack."""
    observation = _observation(session, weights, payload, job)
    attack = strategies.armed(job.strategy, observation, session.spec.config.attacks[job.attack].build())
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
