"""Inverting Gradients: the direction of the gradient and a smooth image, by Adam on the sign of the gradient."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings, LabelSource
from fedsim.attacks.box_adam import BoxAdam
from fedsim.attacks.distances import AbsoluteError, CosineDistance, Distance, LayerCosine, Targets
from fedsim.attacks.gradient_matching import GradientMatching, loss_at, rates_by_scale
from fedsim.attacks.labels import labels_from, last_linear, one_hot
from fedsim.attacks.learning import LearningContext
from fedsim.attacks.priors import total_variation
from fedsim.attacks.rehearsal import rehearse
from fedsim.data.public import PublicSource
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation, Reconstruction
from fedsim.replay import Replayed

DECAY_AT = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the iterations after which the step becomes ten times smaller."""

OBJECTIVES: dict[str, Callable[[Targets], Distance]] = {
    "cosine": CosineDistance,
    "layer_cosine": LayerCosine,
    "l1": AbsoluteError,
}

MARGIN = 0.5
"""Decibels that a weight must gain on public images over one before it: less is chance, with a few of them."""


class GIAConfig(AttackSettings):
    """Inverting Gradients (Geiping et al., NeurIPS 2020): cosine distance and total variation, labels known."""

    name: Literal["gia"] = "gia"
    iterations: int = Field(default=4800, ge=1)
    """Adam steps; published: 24,000 for one image, 4,800 for batches."""
    learning_rate: float = Field(default=0.1, gt=0)
    """First step size, in pixel units; a tenth after 3/8, 5/8 and 7/8 of the iterations each."""
    tv: float | tuple[float, ...] = 3.0
    """Weight of the total variation; see `relative_tv`. Of several, e.g. `[0.03, 0.3, 3, 30, 300]`, the one that
    finds public images best, by each strategy of each adversary, through the defense where that is known; of
    those within half a decibel of it the first."""
    public: PublicSource = "test"
    """Where these images come from: `test`, the test images of the clients' data set (an attacker with public
    images of the same distribution), or all images of another data set that no client holds."""
    tuning_victims: int = Field(default=8, ge=1)
    """Gradients of public images that each weight is tried on."""
    relative_tv: bool = True
    """Whether `tv` is in units of the cosine distance reached so far, which needs no tuning by model and lets the
    prior count for as much as the gradient leaves open; if not, beside the plain cosine distance, as published
    (1e-4 to 0.2 in various codes)."""
    objective: Literal["cosine", "layer_cosine", "l1"] = "cosine"
    """What is minimised beside the prior: the cosine distance of the whole gradient, as published; its mean over
    parameters; or the absolute error."""
    labels: LabelSource = "known"
    """`known`, as published, or `recovered` from the last layer's gradient."""

    @field_validator("tv", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        several = isinstance(value, list | tuple)
        try:
            weights = tuple(float(one) for one in (value if several else [value]))
        except (TypeError, ValueError):
            weights = ()
        if not weights or not all(0 <= one < math.inf for one in weights):
            raise ValueError("a weight is a number of at least 0; several to choose from are a list")
        if several and len(set(weights)) < max(2, len(weights)):
            raise ValueError("several weights to choose from are two or more, all different")
        return weights if several else weights[0]

    @model_validator(mode="after")
    def _something_to_tune(self) -> Self:
        for name in ("public", "tuning_victims"):
            if not self.candidates and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: without several weights `tv` there is nothing to tune on public images")
        return self

    @property
    def candidates(self) -> tuple[float, ...]:
        """The weights of the total variation to choose from; empty if it is given."""
        return self.tv if isinstance(self.tv, tuple) else ()

    @property
    def knows_labels(self) -> bool:
        """Whether labels are given."""
        return self.labels == "known"

    @property
    def public_source(self) -> PublicSource | None:
        """See `AttackSettings`: images to tune on."""
        return self.public if self.candidates else None

    @property
    def simulates_defense(self) -> bool:
        """See `AttackSettings`: who knows the defense tunes through it."""
        return bool(self.candidates)

    @property
    def rehearses(self) -> bool:
        """See `AttackSettings`: each strategy is tuned by itself."""
        return bool(self.candidates)

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: labels are recovered from a last linear layer."""
        if self.labels == "recovered":
            last_linear(model)

    def check_public(self, count: int, batch_size: int) -> None:
        """See `AttackSettings.check_public`: no image is used twice."""
        needed = self.tuning_victims * batch_size
        if self.candidates and count < needed:
            raise ConfigError(
                f"gia: {count} public images are too few to tune `tv` on: {self.tuning_victims} gradients of "
                f"{batch_size} image(s) take {needed}"
            )

    def check_unknown_rate(self) -> None:
        """See `AttackSettings.check_unknown_rate`: public gradients are made at the clients' rate."""
        if self.candidates:
            raise ConfigError("gia: to choose `tv` on public images takes the clients' learning rate")

    def build(self) -> Attack:
        """Return the attack."""
        return GIA(self, OBJECTIVES[self.objective])


@dataclass(frozen=True)
class Tuned:
    """How well public images were found.

    Attributes:
        weights: The weights of the total variation that were tried.
        scores: The mean PSNR that each reached, in dB.
        victims: Number of gradients that each was tried on.
    """

    weights: tuple[float, ...]
    scores: tuple[float, ...]
    victims: int

    @property
    def choice(self) -> float:
        """The first weight whose score is within `MARGIN` of the highest."""
        enough = max(self.scores) - MARGIN
        return next(weight for weight, score in zip(self.weights, self.scores, strict=True) if score >= enough)


class GIA(Attack):
    """Moves every pixel by Adam on the sign of its derivative, inside the box [0, 1].

    With `relative_tv` what is minimised is distance · exp(tv·TV), whose derivative has the direction of
    ∇distance + (tv·distance)·∇TV: the most probable image where the strength of the noise is unknown. Distances
    of equally good images differ by six orders of magnitude between models; one relative weight fits them all.

    Source: Geiping et al., "Inverting Gradients: How easy is it to break privacy in federated learning?",
    NeurIPS 2020; the relative weight is ours, and to choose it on public images.
    """

    def __init__(
        self,
        settings: GIAConfig,
        distance: Callable[[Targets], Distance] = CosineDistance,
        tuned: float | None = None,
    ) -> None:
        """Take the settings, the distance to match by, and the weight of the total variation if it was tuned."""
        self.settings, self.distance, self.tuned = settings, distance, tuned

    @property
    def tv(self) -> float:
        """The weight of the total variation; ConfigError if it is still to be chosen."""
        if self.tuned is not None:
            return self.tuned
        if isinstance(self.settings.tv, tuple):
            raise ConfigError("gia has not chosen `tv` yet: it needs public images")
        return self.settings.tv

    def matching(self, distance: Callable[[Targets], Distance]) -> Attack:
        """See `Attack`."""
        return GIA(self.settings, distance, self.tuned)

    def learn(self, context: LearningContext) -> Tuned | None:
        """See `Attack`: attack public images by each weight, by the adversary's strategy."""
        settings = self.settings
        if not settings.candidates:
            return None
        settings.check_public(context.size, context.batch_size)
        own = rehearse(context, settings.tuning_victims, settings.knows_labels)
        scores = tuple(own.score(GIA(settings, self.distance, weight)) for weight in settings.candidates)
        return Tuned(settings.candidates, scores, settings.tuning_victims)

    def report(self, learned: Tuned) -> str:
        """See `Attack`: the weight that was chosen, and how far each came."""
        tried = ", ".join(f"{w:g}: {s:.1f} dB" for w, s in zip(learned.weights, learned.scores, strict=True))
        return f"tv {learned.choice:g} chosen on {learned.victims} public victims ({tried})"

    def taught(self, learned: Tuned | None) -> "GIA":
        """See `Attack`."""
        return self if learned is None else GIA(self.settings, self.distance, learned.choice)

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`; the total variation counts as it does in the search."""
        distance = loss_at(observation, self.distance, self.settings.ignore, images, labels)
        return self._objective(distance, total_variation(images)[0])

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """Attack all victims × restarts at once; see `Attack`."""
        began = time.perf_counter()
        labels = labels_from(self.settings.labels, observation, "gia")
        return self.search(observation, labels).reconstruction(labels, time.perf_counter() - began)

    def search(self, observation: Observation, labels: Tensor, start: Tensor | None = None) -> BoxAdam:
        """Return the finished search of images with the labels [N, B].

        Args:
            observation: What the server saw.
            labels: The labels to assume.
            start: Where to start, shape [N · restarts, B, C, H, W]; None: at random images.
        """
        settings = self.settings
        search = BoxAdam(observation, settings.restarts, settings.iterations, start)
        matching = GradientMatching(observation, self.distance, settings.ignore)
        variation_of = Replayed(total_variation)
        probabilities = one_hot(labels, observation.model.classes, observation.weights)[search.victims]
        search.rates = rates_by_scale(matching, search.images, probabilities, search.victims)
        for step in range(settings.iterations):
            match = matching(search.images, probabilities, search.victims, search.rates)
            variation, gradient = variation_of(search.images)
            search.note(self._objective(match.loss, variation), match.scale)
            weight = self.tv * (match.loss if settings.relative_tv else torch.ones_like(variation))
            gradient.mul_(weight.view(-1, 1, 1, 1, 1)).add_(match.by_images)
            decays = sum(step >= share * settings.iterations for share in DECAY_AT)
            search.move(gradient.nan_to_num_().sign_(), settings.learning_rate * 0.1**decays)
        return search

    def _objective(self, distance: Tensor, variation: Tensor) -> Tensor:
        if self.settings.relative_tv:
            return distance * (self.tv * variation).exp()
        return distance + self.tv * variation
