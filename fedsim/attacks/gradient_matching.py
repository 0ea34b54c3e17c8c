"""Gradient matching: how far the gradients of M dummy batches are from what the victims sent, and which way to go.

A *problem* is one dummy batch of one victim; several problems may belong to the same victim. All problems share
the weights, so they are evaluated together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.chain import Pullback, chain_of
from fedsim.attacks.distances import Distance, Scalable, SquaredError, Targets
from fedsim.attacks.labels import one_hot
from fedsim.attacks.transformations import through
from fedsim.errors import ConfigError
from fedsim.learning.layout import ParameterLayout
from fedsim.privacy.observation import Observation
from fedsim.replay import Replayed

PIECE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Problems are evaluated in pieces whose per-image parameter gradients would take at most this many bytes."""


@dataclass(frozen=True)
class Match:
    """The outcome of one evaluation of m problems.

    Attributes:
        loss: Distances, shape [m].
        by_images: Their derivatives by the dummy images, shape [m, B, C, H, W].
        by_probabilities: Their derivatives by the dummy's soft labels, shape [m, B, classes].
        by_log_rate: Their derivatives by the logarithms of the assumed learning rates, shape [m].
        scale: The factor of the dummies' gradients that comes closest to what was sent, shape [m]: an estimate of
            the learning rate where that is unknown.
    """

    loss: Tensor
    by_images: Tensor
    by_probabilities: Tensor
    by_log_rate: Tensor
    scale: Tensor


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
        self.transformation = observation.transformation
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
        sent = Targets(targets, sizes, None if self.whole else tuple(self.spans))
        self.distance = distance(sent)
        self.nearest = self.distance if isinstance(self.distance, Scalable) else SquaredError(sent)
        one = len(weights) * weights.element_size() * observation.batch_size
        self.piece = max(1, PIECE_BYTES.get(weights.device.type, PIECE_BYTES["cpu"]) // one)
        chain = chain_of(observation.model, weights) if observation.local.steps == 1 else None
        singly = self.piece == 1 and not (self.transformation and self.transformation.by_sample)
        self.engine = chain or Autodiff(observation.model, weights, observation.local, singly=singly)
        self.dimension, self.rate = len(weights), observation.local.learning_rate
        self._piece = Replayed(self._evaluate)

    def __call__(
        self, images: Tensor, probabilities: Tensor, victims: Tensor, rates: Tensor | None = None
    ) -> Match:
        """Evaluate m problems.

        Args:
            images: Dummy images, shape [m, B, C, H, W].
            probabilities: Their soft labels, each summing to 1, shape [m, B, classes].
            victims: The victim that each problem belongs to, shape [m].
            rates: The local learning rates to assume in the client's steps, shape [m], where the attacker does not
                know it. What was sent is then matched by the nearest multiple of the gradients, or if the distance
                does not know that, by the gradients times these.
        """
        rates = torch.ones_like(images[:, 0, 0, 0, 0]) if rates is None else rates
        piece = self.piece
        inputs: tuple[Tensor, ...] = (images, probabilities, victims, rates)
        if images.is_cuda:
            piece = even_piece(len(images), self.piece)
            inputs = tuple(padded(tensor, piece) for tensor in inputs)
        parts = [self._piece(*part) for part in zip(*(torch.split(t, piece) for t in inputs), strict=True)]
        return Match(*(torch.cat(values)[: len(images)] for values in zip(*parts, strict=True)))

    def _evaluate(
        self, images: Tensor, probabilities: Tensor, victims: Tensor, rates: Tensor
    ) -> tuple[Tensor, ...]:
        unknown = rates if self.rate is None else None
        gradients, pullback = self._gradients(images, probabilities, unknown, victims)
        selected = self._select(gradients)
        if self.scale is not None:
            selected = selected * self.scale[victims]
        factor = by_log_rate = torch.zeros_like(rates)
        if unknown is None:
            loss, by_selected = self.distance(selected, victims)
        else:
            factor = self.nearest.factor(selected, victims)
            # Where the nearest multiple has a closed form, the loss does not depend on the factor to first order.
            used = factor if isinstance(self.distance, Scalable) else rates
            loss, by_moved = self.distance(selected * used[:, None], victims)
            by_selected = by_moved * used[:, None]
            if used is not factor:
                by_log_rate = (by_selected * selected).sum(1)
        if self.scale is not None:
            by_selected = by_selected * self.scale[victims]
        by_images, by_probabilities, *by_rates = pullback(self._spread(by_selected))
        by_log_rate = sum((by_rate * rates for by_rate in by_rates), by_log_rate)
        return loss, by_images, by_probabilities, by_log_rate, factor

    def _gradients(
        self, images: Tensor, probabilities: Tensor, rates: Tensor | None, victims: Tensor
    ) -> tuple[Tensor, Pullback]:
        if self.transformation is None:
            return self.engine.gradients(images, probabilities, rates)
        return through(self.transformation, self.engine, images, probabilities, rates, victims)

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


def even_piece(problems: int, most: int) -> int:
    """Return the size of even pieces of at most `most` problems: a power of two, where it can be.

    Problems end one by one, and a GPU can repeat a few sizes as graphs, but not all.
    """
    pieces = -(-problems // most)
    return min(most, 1 << (-(-problems // pieces) - 1).bit_length())


def padded(rows: Tensor, piece: int) -> Tensor:
    """Repeat the first of rows [m, ...] until their number is a multiple of `piece`."""
    missing = -len(rows) % piece
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows


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
    images = images.to(observation.weights)
    return matching(images, probabilities, victims, rates_by_scale(matching, images, probabilities, victims)).loss


ROUNDS = 8
"""Secant steps by which a learning rate is estimated from the scale of what was sent."""


def rates_by_scale(
    matching: GradientMatching, images: Tensor, probabilities: Tensor, victims: Tensor
) -> Tensor | None:
    """Estimate the local learning rates [m] of problems from the scale of what was sent; None if it is known.

    An update of several steps is η·G(η), G the sum of the gradients along the way. The map η ↦ s(η) =
    ⟨G(η), sent⟩ / ‖G(η)‖² has the true rate for a fixed point where the images are the true ones, and one near to
    it where they are not: the last layer's gradient, the largest, depends on the labels more than on the images.
    """
    if matching.rate is not None:
        return None
    before = torch.zeros_like(images[:, 0, 0, 0, 0])
    rates = matching(images, probabilities, victims, before).scale
    gap_before = rates
    for _ in range(ROUNDS):
        scale = matching(images, probabilities, victims, rates).scale
        gap = scale - rates
        # Where rates change the gradients a lot, going to s(η) itself would not come to rest.
        step = rates - gap * (rates - before) / (gap - gap_before)
        before, gap_before = rates, gap
        rates = torch.where(torch.isfinite(step) & (step > 0), step, scale)
    return rates


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
