"""Gradient matching: how far the gradients of M dummy batches are from what the victims sent, and which way to go.

A *problem* is one dummy batch of one victim; several problems may belong to the same victim. All problems share
the weights, so they are evaluated together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from fedsim.attacks.chain import Pullback, chain_of
from fedsim.attacks.distances import Distance, Targets
from fedsim.attacks.labels import one_hot
from fedsim.errors import ConfigError
from fedsim.learning.layout import ParameterLayout
from fedsim.learning.models import Model
from fedsim.privacy.observation import ONE_STEP, LocalTraining, Observation

PIECE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Problems are evaluated in pieces whose per-image parameter gradients would take at most this many bytes."""


@dataclass(frozen=True)
class Match:
    """The outcome of one evaluation of m problems.

    Attributes:
        loss: Distances, shape [m].
        by_images: Their derivatives by the dummy images, shape [m, B, C, H, W].
        by_probabilities: Their derivatives by the dummy's soft labels, shape [m, B, classes].
    """

    loss: Tensor
    by_images: Tensor
    by_probabilities: Tensor


class GradientMatching:
    """Compares dummy batches with what the victims of an observation sent."""

    def __init__(
        self,
        observation: Observation,
        distance: Callable[[Targets], Distance],
        ignore: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        """Prepare the comparison.

        Args:
            observation: What the server saw.
            distance: Makes the distance from what the victims sent.
            ignore: Shell patterns of parameters that are left out on both sides.
            dtype: Floating-point type to work in; that of the weights if None.

        Raises:
            ConfigError: If a pattern matches nothing, if nothing is left to match, or if a gradient is not finite.
        """
        weights, layout = observation.weights.to(dtype), observation.model.layout
        kept = kept_parameters(layout, ignore)
        self.spans = [layout.span(name) for name in kept]
        self.whole = len(kept) == len(layout.names)
        targets = self._select(observation.gradients.to(weights))
        for victim, finite in enumerate(torch.isfinite(targets).all(1).tolist()):
            if not finite:
                raise ConfigError(f"the gradient of victim {victim} holds values that are not finite")
        # Scaling both sides lets every distance weigh entries by trust without knowing of it.
        self.scale = None if observation.trust is None else self._select(observation.trust.to(weights)).sqrt()
        if self.scale is not None:
            targets = targets * self.scale
        sizes = tuple(span.stop - span.start for span in self.spans)
        self.distance = distance(Targets(targets, sizes, None if self.whole else tuple(self.spans)))
        chain = chain_of(observation.model, weights) if observation.local.steps == 1 else None
        self.engine = chain or Autodiff(observation.model, weights, observation.local)
        self.dimension = len(weights)
        one = len(weights) * weights.element_size() * observation.batch_size
        self.piece = max(1, PIECE_BYTES.get(weights.device.type, PIECE_BYTES["cpu"]) // one)

    def __call__(self, images: Tensor, probabilities: Tensor, victims: Tensor) -> Match:
        """Evaluate m problems.

        Args:
            images: Dummy images, shape [m, B, C, H, W].
            probabilities: Their soft labels, each summing to 1, shape [m, B, classes].
            victims: The victim that each problem belongs to, shape [m].
        """
        inputs = zip(*(torch.split(t, self.piece) for t in (images, probabilities, victims)), strict=True)
        parts = [self._piece(*part) for part in inputs]
        loss, by_images, by_probabilities = (torch.cat(values) for values in zip(*parts, strict=True))
        return Match(loss, by_images, by_probabilities)

    def _piece(self, images: Tensor, probabilities: Tensor, victims: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients, pullback = self.engine.gradients(images, probabilities)
        selected = self._select(gradients)
        if self.scale is None:
            loss, by_selected = self.distance(selected, victims)
        else:
            scale = self.scale[victims]
            loss, by_selected = self.distance(selected * scale, victims)
            by_selected = by_selected * scale
        return loss, *pullback(self._spread(by_selected))

    def _select(self, vectors: Tensor) -> Tensor:
        return vectors if self.whole else torch.cat([vectors[:, span] for span in self.spans], 1)

    def _spread(self, selected: Tensor) -> Tensor:
        if self.whole:
            return selected
        spread, start = selected.new_zeros(len(selected), self.dimension), 0
        for span in self.spans:
            end = start + span.stop - span.start
            spread[:, span] = selected[:, start:end]
            start = end
        return spread


def loss_at(
    observation: Observation,
    distance: Callable[[Targets], Distance],
    ignore: tuple[str, ...],
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """Return the distances [N] of given images [N, B, C, H, W] with labels [N, B] from what their victims sent."""
    matching = GradientMatching(observation, distance, ignore)
    probabilities = one_hot(labels, observation.model.classes, observation.weights)
    victims = torch.arange(observation.victims, device=observation.weights.device)
    return matching(images.to(observation.weights), probabilities, victims).loss


class Autodiff:
    """Per-problem gradients of any model by automatic differentiation, through several local steps if need be.

    Source: Geiping et al., "Inverting Gradients", NeurIPS 2020, section 6 (federated averaging).
    """

    def __init__(self, model: Model, weights: Tensor, local: LocalTraining = ONE_STEP) -> None:
        """Take flat `weights` [d] and the local training; each step uses the next of the images, evenly shared."""

        def loss(weights: Tensor, images: Tensor, probabilities: Tensor) -> Tensor:
            return F.cross_entropy(model.logits(weights, images), probabilities)

        def update(weights: Tensor, images: Tensor, probabilities: Tensor) -> Tensor:
            batches = zip(*(t.chunk(local.steps) for t in (images, probabilities)), strict=True)
            total = torch.zeros_like(weights)
            for batch in batches:
                total = total + grad(loss)(weights - local.learning_rate * total, *batch)
            return total

        one = grad(loss) if local.steps == 1 else update
        self.weights, self.gradient = weights, vmap(one, in_dims=(None, 0, 0))

    def gradients(self, images: Tensor, probabilities: Tensor) -> tuple[Tensor, Pullback]:
        """See `Chain.gradients`."""
        with torch.enable_grad():
            inputs = images.detach().requires_grad_(), probabilities.detach().requires_grad_()
            gradients = self.gradient(self.weights, *inputs)

        def pullback(v: Tensor) -> tuple[Tensor, Tensor]:
            by_images, by_probabilities = torch.autograd.grad(gradients, inputs, v)
            return by_images, by_probabilities

        return gradients.detach(), pullback


def kept_parameters(layout: ParameterLayout, ignore: tuple[str, ...]) -> list[str]:
    """Return the names that no shell pattern of `ignore` matches.

    Raises:
        ConfigError: If a pattern matches no parameter, or the patterns match all of them.
    """
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in layout.names):
            raise ConfigError(f"ignore: {pattern!r} matches no parameter of {', '.join(layout.names)}")
    kept = [name for name in layout.names if not any(fnmatchcase(name, p) for p in ignore)]
    if not kept:
        raise ConfigError("ignore: nothing is left to match")
    return kept
