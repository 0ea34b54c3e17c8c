"""What a defense does to every gradient alike, done to the dummy's gradient as well before the two are compared.

Noise has no part in it: its expectation is zero. Clipping and pruning are functions of the gradient alone, which
an attacker can repeat, and differentiate.

Source: Li, Zhang, Liu and Liu, "Auditing Privacy Defenses in Federated Learning via Generative Gradient Leakage"
(GGL), CVPR 2022 (gradient transformation).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedsim.attacks.estimates import clipping_norm, mean_of_rounds
from fedsim.privacy.observation import Observation

if TYPE_CHECKING:
    from fedsim.attacks.autodiff import Autodiff
    from fedsim.attacks.chain import Chain, Pullback


class Transformation(Protocol):
    """A function of gradients, one for each victim."""

    @property
    def by_sample(self) -> bool:
        """Whether it acts on each sample's gradient, before they are averaged."""
        ...

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Transform the gradients [m, d] of dummies of `victims` [m].

        Returns:
            Transformed gradients [m, d], and the function that turns derivatives by them [m, d] into derivatives
            by `gradients`.
        """
        ...


@dataclass(frozen=True)
class Clipping:
    """Scale gradients that are longer than a norm down to it: `norms` [N], in gradient units."""

    norms: Tensor
    by_sample: bool = False

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """See `Transformation`: c·g/‖g‖, whose derivative leaves out the direction of g, where ‖g‖ > c."""
        norms, lengths = self.norms.to(gradients)[victims, None], gradients.norm(dim=1, keepdim=True)
        clipped, factor = lengths > norms, norms / torch.maximum(lengths, norms)

        def back(by_seen: Tensor) -> Tensor:
            along = (by_seen * gradients).sum(1, keepdim=True) / lengths.square()
            return factor * torch.where(clipped, by_seen - along * gradients, by_seen)

        return factor * gradients, back


@dataclass(frozen=True)
class Pruning:
    """Take from entries what pruning may have hidden: at most `hidden` [N, d] in magnitude, 0 where nothing is.

    A pruned entry counts by how far it exceeds what may have been pruned, and not at all below. To prune the dummy
    by its own ranks leaves no residual at the true image either, but jumps wherever two entries change ranks.
    """

    hidden: Tensor
    by_sample: bool = False

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """See `Transformation`: sign(g)·max(|g| − hidden, 0)."""
        hidden = self.hidden[victims].to(gradients)
        excess = gradients.abs() - hidden
        return excess.clamp_min(0).copysign(gradients), lambda by_seen: by_seen * (excess > 0)


def clipping_of(observation: Observation) -> Transformation | None:
    """Return the clipping that the defense does; None if it does none.

    Where its norm is estimated, `observation` must hold the mean of the rounds: see `clipping_norm`.
    """
    assert observation.knowledge
    defense = observation.knowledge.defense
    if getattr(defense, "clipping_norm", None) is None:
        return None
    norms = clipping_norm(observation, observation.knowledge)
    return Clipping(norms, by_sample=getattr(defense, "clip", "client") == "sample")


def pruning_of(observation: Observation) -> Transformation:
    """Return the pruning that the zeros tell: nothing pruned exceeds the smallest survivor of its parameter."""
    hidden = torch.zeros_like(observation.gradients)
    sizes = observation.model.layout.sizes
    for part, own in zip(observation.gradients.split(sizes, 1), hidden.split(sizes, 1), strict=True):
        survivors = torch.where(part != 0, part.abs(), torch.inf).amin(1, keepdim=True)
        own.copy_(torch.where(part != 0, 0, survivors))
    return Pruning(hidden)


TRANSFORMATIONS: Mapping[str, Callable[[Observation], Transformation | None]] = MappingProxyType(
    {"clipped": clipping_of, "laplace": lambda seen: clipping_of(mean_of_rounds(seen)), "pruned": pruning_of}
)
"""What strategies do to the dummy's gradient, by the names of the strategies."""


def through(
    transformation: Transformation,
    engine: "Chain | Autodiff",
    images: Tensor,
    probabilities: Tensor,
    rates: Tensor | None,
    victims: Tensor,
) -> "tuple[Tensor, Pullback]":
    """Return the transformed gradients [m, d] of m dummy batches and their pull-back; see `Chain.gradients`.

    Where samples are transformed one by one, each is a problem of the engine.
    """
    if not transformation.by_sample:
        gradients, pullback = engine.gradients(images, probabilities, rates)
        seen, back = transformation(gradients, victims)
        return seen, lambda by_seen: pullback(back(by_seen))
    samples = images.shape[1]
    gradients, pullback = engine.gradients(images.flatten(0, 1)[:, None], probabilities.flatten(0, 1)[:, None])
    seen, back = transformation(gradients, victims.repeat_interleave(samples))

    def by_batch(by_seen: Tensor) -> tuple[Tensor, ...]:
        by_images, by_probabilities = pullback(back(by_seen.repeat_interleave(samples, 0) / samples))
        return by_images.view_as(images), by_probabilities.view_as(probabilities)

    return seen.view(len(images), samples, -1).mean(1), by_batch
