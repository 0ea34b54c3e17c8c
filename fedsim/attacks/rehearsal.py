"""A rehearsal: an attack on victims of the attacker's own, made of public images, whose truth it may look at."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.base import Attack
from fedsim.attacks.learning import LearningContext
from fedsim.attacks.strategies import apply, armed
from fedsim.defenses.base import DefenseSettings
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Knowledge, Observation

DRAW, SEEDS, PROTECTION = range(3)
"""What the streams of a `LearningContext` are for."""


@dataclass(frozen=True)
class Rehearsal:
    """Victims made of public images, and how they would be attacked.

    Attributes:
        images: Their images, shape [N, B, C, H, W], in [0, 1].
        observation: What the server would see of them.
        strategy: What the adversary makes of it; "" is the plain attack.
    """

    images: Tensor
    observation: Observation
    strategy: str

    def score(self, attack: Attack) -> float:
        """Return the mean PSNR, in dB, that an attack reaches by the strategy."""
        seen = apply(self.strategy, self.observation, attack)
        found = armed(self.strategy, seen, attack).reconstruct(seen)
        rows = score(self.images.cpu(), found.images.cpu())
        return sum(row.PSNR for row in rows) / len(rows)


def rehearse(context: LearningContext, count: int, knows_labels: bool) -> Rehearsal:
    """Draw `count` victims from the public images and let them send what clients would send.

    They protect their gradients with fresh draws by the defense that the context knows, once for each of its
    rounds, or not at all if it knows of none. What they draw in secret is told only to a strategy that needs the
    oracle: the victims' own secrets, and their images, are not at hand here.

    Args:
        context: What is at hand.
        count: Number of victims N.
        knows_labels: Whether the attack is told labels.
    """
    everything = torch.arange(context.size, device=context.weights.device)
    batches = context.batches(everything, count, context.generator(DRAW))
    images, labels = context.take(batches)
    gradients = torch.cat([part for _, part in context.pieces(batches)])
    draws = [_protected(context, batches, gradients, round_) for round_ in range(context.rounds)]
    seeds = torch.randint(2**62, (count,), generator=context.generator(SEEDS), device=context.weights.device)
    observation = Observation(
        model=context.model,
        weights=context.weights,
        gradients=draws[0],
        batch_size=context.batch_size,
        statistics=context.weights.new_zeros(count, 0),
        labels=labels if knows_labels else None,
        seeds=tuple(seeds.tolist()),
        knowledge=context.knowledge and _knowledge(context, context.knowledge, batches, draws),
        local=context.local,
    )
    return Rehearsal(images, observation, context.strategy)


def _generators(context: LearningContext, victims: int, round_: int) -> list[torch.Generator]:
    return [context.generator(PROTECTION, round_, victim) for victim in range(victims)]


def _protected(context: LearningContext, batches: Tensor, gradients: Tensor, round_: int) -> Tensor:
    clients = context.clients(batches, _generators(context, len(batches), round_))
    return context.protected(gradients, clients)


def _knowledge(context: LearningContext, known: Knowledge, batches: Tensor, draws: list[Tensor]) -> Knowledge:
    secrets: dict[str, Tensor] = {}
    settings: DefenseSettings = known.defense
    if context.strategy in settings.oracle_strategies():
        # Generators of their own, which start afresh: the same draws are made again.
        secrets = settings.build().secrets(context.clients(batches, _generators(context, len(batches), 0)))
    repeats = torch.stack(draws[1:], 1) if len(draws) > 1 else draws[0][:, None][:, :0]
    return Knowledge(settings, known.public, secrets, repeats, known.parameters)
