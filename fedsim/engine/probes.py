"""What victims send when they are probed. No Ray here."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad_and_value
from torch.nn import functional as F

from fedsim.defenses.base import ClientContext, Public
from fedsim.engine.acceptance import as_rows
from fedsim.engine.session import Session
from fedsim.errors import RunError
from fedsim.learning.batches import Indices
from fedsim.privacy.observation import Payload, Victim
from fedsim.randomness import Purpose


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
    seen = _visible(session, updates, context, victims)
    # A context of its own: its streams start afresh, so that the same draws are made again.
    secrets = session.defense.secrets(
        session.client_context(weights, public, batches, purpose, round_, streams, local_steps=steps)
    )
    return Payload(
        seen.cpu().numpy(),
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
        seen[:, repeat] = _visible(session, gradients, context, victims)
    return np.asarray(seen.cpu().numpy(), dtype=np.float32)


def _visible(session: Session, updates: Tensor, context: ClientContext, victims: tuple[Victim, ...]) -> Tensor:
    """Return what the server sees of victims who protect `updates` [N, d], in the same shape.

    Raises:
        RunError: If one of them sends another size than the model's, which no attack can read.
    """
    rows, reasons = as_rows(session.defense.protect(updates, context), updates, updates.shape[1])
    for row, reason in reasons.items():
        raise RunError(f"audit: client {victims[row].client} sent an update that cannot be attacked: {reason}")
    return session.aggregation.visible(rows).detach()
