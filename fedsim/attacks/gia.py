"""Inverting Gradients: the direction of the gradient and a smooth image, by Adam on the sign of the gradient."""

import time
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings, LabelSource
from fedsim.attacks.box_adam import BoxAdam
from fedsim.attacks.distances import AbsoluteError, CosineDistance, Distance, LayerCosine, Targets
from fedsim.attacks.gradient_matching import GradientMatching, loss_at, rates_by_scale
from fedsim.attacks.labels import labels_from, last_linear, one_hot
from fedsim.attacks.priors import total_variation
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


class GIAConfig(AttackSettings):
    """Inverting Gradients (Geiping et al., NeurIPS 2020): cosine distance and total variation, labels known."""

    name: Literal["gia"] = "gia"
    iterations: int = Field(default=4800, ge=1)
    """Adam steps; published: 24,000 for one image, 4,800 for batches."""
    learning_rate: float = Field(default=0.1, gt=0)
    """First step size, in pixel units; a tenth after 3/8, 5/8 and 7/8 of the iterations each."""
    tv: float = Field(default=3.0, ge=0)
    """Weight of the total variation; see `relative_tv`."""
    relative_tv: bool = True
    """Whether `tv` is in units of the cosine distance reached so far, which needs no tuning by model and lets the
    prior count for as much as the gradient leaves open; if not, beside the plain cosine distance, as published
    (1e-4 to 0.2 in various codes)."""
    objective: Literal["cosine", "layer_cosine", "l1"] = "cosine"
    """What is minimised beside the prior: the cosine distance of the whole gradient, as published; its mean over
    parameters; or the absolute error."""
    labels: LabelSource = "known"
    """`known`, as published, or `recovered` from the last layer's gradient."""

    @property
    def knows_labels(self) -> bool:
        """Whether labels are given."""
        return self.labels == "known"

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: labels are recovered from a last linear layer."""
        if self.labels == "recovered":
            last_linear(model)

    def build(self) -> Attack:
        """Return the attack."""
        return GIA(self, OBJECTIVES[self.objective])


class GIA(Attack):
    """Moves every pixel by Adam on the sign of its derivative, inside the box [0, 1].

    With `relative_tv` what is minimised is distance · exp(tv·TV), whose derivative has the direction of
    ∇distance + (tv·distance)·∇TV: the most probable image where the strength of the noise is unknown. Distances
    of equally good images differ by six orders of magnitude between models; one relative weight fits them all.

    Source: Geiping et al., "Inverting Gradients: How easy is it to break privacy in federated learning?",
    NeurIPS 2020; the relative weight is ours.
    """

    def __init__(self, settings: GIAConfig, distance: Callable[[Targets], Distance] = CosineDistance) -> None:
        """Take the settings, and the distance to match by."""
        self.settings, self.distance = settings, distance

    def matching(self, distance: Callable[[Targets], Distance]) -> Attack:
        """See `Attack`."""
        return GIA(self.settings, distance)

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`; the total variation counts as it does in the search."""
        distance = loss_at(observation, self.distance, self.settings.ignore, images, labels)
        return _objective(distance, total_variation(images)[0], self.settings)

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
            search.note(_objective(match.loss, variation, settings), match.scale)
            weight = settings.tv * (match.loss if settings.relative_tv else torch.ones_like(variation))
            gradient.mul_(weight.view(-1, 1, 1, 1, 1)).add_(match.by_images)
            decays = sum(step >= share * settings.iterations for share in DECAY_AT)
            search.move(gradient.nan_to_num_().sign_(), settings.learning_rate * 0.1**decays)
        return search


def _objective(distance: Tensor, variation: Tensor, settings: GIAConfig) -> Tensor:
    if settings.relative_tv:
        return distance * (settings.tv * variation).exp()
    return distance + settings.tv * variation
