"""Inverting Gradients: the direction of the gradient and a smooth image, by Adam on the sign of the gradient."""

import time
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings, LabelSource
from fedsim.attacks.distances import AbsoluteError, CosineDistance, Distance, LayerCosine, Targets
from fedsim.attacks.gradient_matching import GradientMatching, loss_at
from fedsim.attacks.labels import labels_from, last_linear, one_hot
from fedsim.attacks.lbfgs import SIGNIFICANT
from fedsim.attacks.priors import total_variation
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation, Reconstruction
from fedsim.randomness import Purpose, torch_stream

DECAY_AT = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the iterations after which the step becomes ten times smaller."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's, as in Kingma and Ba, 2015."""


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
        run = _Run(observation, labels, self.settings, self.distance)
        for _ in range(self.settings.iterations):
            run.step()
        loss, chosen = run.best_loss.view(observation.victims, -1).min(1)
        chosen = chosen + self.settings.restarts * torch.arange(observation.victims, device=chosen.device)
        stalled = ~(loss < (1 - SIGNIFICANT) * run.first_loss[chosen])
        return Reconstruction(
            images=run.best[chosen],
            labels=labels,
            loss=loss,
            iterations=torch.full_like(chosen, self.settings.iterations),
            stalled=stalled,
            exhausted=~stalled & (loss < (1 - SIGNIFICANT) * run.mark[chosen]),
            seconds=time.perf_counter() - began,
        )


class _Run:
    """Adam on M = victims × restarts problems; every tensor has a leading dimension M."""

    def __init__(
        self,
        observation: Observation,
        labels: Tensor,
        settings: GIAConfig,
        distance: Callable[[Targets], Distance],
    ) -> None:
        self.settings = settings
        self.matching = GradientMatching(observation, distance, settings.ignore)
        everyone = torch.arange(observation.victims, device=observation.weights.device)
        self.victims = everyone.repeat_interleave(settings.restarts)
        self.probabilities = one_hot(labels, observation.model.classes, observation.weights)[self.victims]
        self.images = _starts(observation, settings.restarts)
        self.mean, self.square = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self.best = self.images.clone()
        self.best_loss = self.images.new_full((len(self.images),), torch.inf)
        self.first_loss = self.mark = self.best_loss
        self.done = 0

    def step(self) -> None:
        """Evaluate, note what is best, and move."""
        match = self.matching(self.images, self.probabilities, self.victims)
        variation, by_images = total_variation(self.images)
        loss = _objective(match.loss, variation, self.settings)
        better = loss < self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best[better] = self.images[better]
        if self.done == 0:
            self.first_loss = loss
        if self.done == self.settings.iterations * 9 // 10:
            self.mark = self.best_loss
        weight = self.settings.tv * (match.loss if self.settings.relative_tv else torch.ones_like(loss))
        gradient = by_images.mul_(weight.view(-1, 1, 1, 1, 1)).add_(match.by_images)
        self._move(gradient.nan_to_num_().sign_())

    def _move(self, gradient: Tensor) -> None:
        decays = sum(self.done >= share * self.settings.iterations for share in DECAY_AT)
        rate = self.settings.learning_rate * 0.1**decays
        self.done += 1
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        scale = (self.square / (1 - BETAS[1] ** self.done)).sqrt_().add_(EPSILON)
        self.images.addcdiv_(self.mean, scale, value=-rate / (1 - BETAS[0] ** self.done)).clamp_(0, 1)


def _objective(distance: Tensor, variation: Tensor, settings: GIAConfig) -> Tensor:
    if settings.relative_tv:
        return distance * (settings.tv * variation).exp()
    return distance + settings.tv * variation


def _starts(observation: Observation, restarts: int) -> Tensor:
    """Draw U[0, 1) images [N · restarts, B, C, H, W], each from its own stream."""
    shape = (observation.batch_size, *observation.model.shape)
    draws = [
        torch.rand(shape, generator=torch_stream(seed, Purpose.ATTACK, restart))
        for seed in observation.seeds
        for restart in range(restarts)
    ]
    return torch.stack(draws).to(observation.weights)
