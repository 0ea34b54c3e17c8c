"""GradInversion: gradients and batch-norm statistics at once, by several searches that keep each other in line."""

import time
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import vmap

from fedsim.attacks.base import Attack, AttackSettings, LabelSource
from fedsim.attacks.box_adam import BoxAdam
from fedsim.attacks.distances import Distance, SquaredError, Targets
from fedsim.attacks.gradient_matching import GradientMatching, rates_by_scale
from fedsim.attacks.labels import labels_from, last_linear, one_hot
from fedsim.attacks.priors import total_variation
from fedsim.attacks.schedules import warm_cosine
from fedsim.errors import ConfigError
from fedsim.learning import batch_norm
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation, Reconstruction

WARM_UP = 50
"""Steps in which the step size rises to its full length, as published."""


class GradInversionConfig(AttackSettings):
    """GradInversion (Yin et al., CVPR 2021): batch-norm statistics and group consistency, labels recovered."""

    name: Literal["gradinversion"] = "gradinversion"
    iterations: int = Field(default=4800, ge=1)
    """Adam steps; published: 20,000."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Largest step size, in pixel units: it rises for 50 steps, then falls to 0 along a cosine, as published."""
    restarts: int = Field(default=4, ge=1)
    """Searches a victim, the group; the one with the lowest loss counts."""
    statistics: float = Field(default=1.0, ge=0)
    """Weight of the batch-norm statistics, see `StatisticsError`, beside the distance of the gradients."""
    tv: float = Field(default=3.0, ge=0)
    """Weight of the total variation, in units of what gradients and statistics leave open, as in `gia`."""
    group: float = Field(default=3.0, ge=0)
    """Weight of the mean squared difference from the group's mean image, in the same units."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise added to each pixel in each step, in units of the step size; published: 0.2,
    which costs more than it gives on small images."""
    labels: LabelSource = "recovered"
    """`recovered` from the last layer's gradient, as published, or `known`."""

    @property
    def knows_labels(self) -> bool:
        """Whether labels are given."""
        return self.labels == "known"

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: a model with batch norm, and a last linear layer to recover labels from."""
        if not model.has_batch_norm:
            raise ConfigError("gradinversion matches batch-norm statistics, but the model has none: use gia")
        if self.labels == "recovered":
            last_linear(model)

    def build(self) -> Attack:
        """Return the attack."""
        return GradInversion(self)


class GradInversion(Attack):
    """Moves every pixel by Adam, inside the box [0, 1]; all restarts of a victim are a group.

    What is minimised is (distance + statistics · S) · exp(tv · TV), S the `StatisticsError`; the published sum has
    absolute weights, which would need tuning for every model. The pull towards the group's mean image directs the
    search but does not count in the loss by which the best is chosen. The published attack also registers the
    images of a group before averaging, and penalises their norm with a weight of 1e-6; this one does neither.

    Source: Yin et al., "See through Gradients: Image Batch Recovery via GradInversion", CVPR 2021; the relative
    weights are ours.
    """

    def __init__(
        self, settings: GradInversionConfig, distance: Callable[[Targets], Distance] = SquaredError
    ) -> None:
        """Take the settings, and the distance to match gradients by."""
        self.settings, self.distance = settings, distance

    def matching(self, distance: Callable[[Targets], Distance]) -> Attack:
        """See `Attack`."""
        return GradInversion(self.settings, distance)

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`; statistics and total variation count as they do in the search."""
        victims = torch.arange(observation.victims, device=observation.weights.device)
        probabilities = one_hot(labels, observation.model.classes, observation.weights)
        objective = _Objective(observation, self.distance, self.settings)
        images = images.to(observation.weights)
        rates = rates_by_scale(objective.matching, images, probabilities, victims)
        return objective(images, probabilities, victims, rates)[0]

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """Attack all victims × restarts at once; see `Attack`."""
        began = time.perf_counter()
        labels = labels_from(self.settings.labels, observation, "gradinversion")
        return self.search(observation, labels).reconstruction(labels, time.perf_counter() - began)

    def search(self, observation: Observation, labels: Tensor) -> BoxAdam:
        """Return the finished search of images with the labels [N, B]."""
        settings = self.settings
        search = BoxAdam(observation, settings.restarts, settings.iterations)
        objective = _Objective(observation, self.distance, settings)
        probabilities = one_hot(labels, observation.model.classes, observation.weights)[search.victims]
        search.rates = rates_by_scale(objective.matching, search.images, probabilities, search.victims)
        for step in range(settings.iterations):
            loss, gradient, unit, scale = objective(search.images, probabilities, search.victims, search.rates)
            search.note(loss, scale)
            _, pull = group_distance(search.images, settings.restarts)
            gradient.add_(pull.mul_((settings.group * unit).view(-1, 1, 1, 1, 1)))
            rate = warm_cosine(settings.learning_rate, step, settings.iterations, WARM_UP)
            search.move(gradient.nan_to_num_(), rate)
            search.shake(settings.noise * rate)
        return search


def group_distance(images: Tensor, restarts: int) -> tuple[Tensor, Tensor]:
    """Return how far each image is from the mean image of its group.

    Args:
        images: Shape [N · restarts, B, C, H, W], group by group.
        restarts: Size of a group.

    Returns:
        The mean squared differences, shape [N · restarts], and their derivatives by `images`, the mean held fixed.

    Source: Yin et al., CVPR 2021 (group consistency), with the pixels' mean for the consensus.
    """
    groups = images.view(-1, restarts, *images.shape[1:])
    residual = (groups - groups.mean(1, keepdim=True)).view_as(images)
    return residual.square().flatten(1).mean(1), residual.mul(2 / images[0].numel())


class StatisticsError:
    """How far the batch-norm statistics of dummy batches are from those that the victims sent.

    The mean over layers and their channels of (μ − m)²/(v + ε) + (σ² − v)²/(v + ε)², where m and v are mean and
    variance as sent, μ and σ² those of the dummies, and ε is the layer's own. Where averages normalise and no
    statistics were sent, m and v are the averages: what images are like, as published. Several local steps count
    as their last one, at the weights before the first.

    Source: Yin et al., CVPR 2021 (norms by layer, without the division).
    """

    def __init__(self, observation: Observation) -> None:
        """Take what the victims sent.

        Raises:
            ConfigError: If there are no statistics to compare with.
        """
        self.model, self.weights = observation.model, observation.weights
        self.images = observation.batch_size // observation.local.steps
        self.targets = _targets(observation).to(self.weights)
        scales, start = [], 0
        norms = list(batch_norm.layers(self.model.module))
        for layer in norms:
            middle, end = start + layer.channels, start + 2 * layer.channels
            scale = 1 / (self.targets[:, middle:end] + layer.eps)
            scales += [scale / layer.channels, scale.square() / layer.channels]
            start = end
        self.scale = torch.cat(scales, 1) / len(norms)

    def __call__(self, images: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """Compare dummy images [m, B, C, H, W] with `victims` [m]: errors [m], derivatives by the images."""
        with torch.enable_grad():
            inputs = images.detach().requires_grad_()
            seen = vmap(lambda batch: self.model.statistics(self.weights, batch))(inputs[:, -self.images :])
            error = ((seen - self.targets[victims]).square() * self.scale[victims]).sum(1)
            (slope,) = torch.autograd.grad(error.sum(), inputs)
        return error.detach(), slope


class _Objective:
    """What is minimised: distance, statistics and total variation together."""

    def __init__(
        self,
        observation: Observation,
        distance: Callable[[Targets], Distance],
        settings: GradInversionConfig,
    ) -> None:
        self.settings = settings
        self.matching = GradientMatching(observation, distance, settings.ignore)
        self.statistics = StatisticsError(observation)

    def __call__(
        self, images: Tensor, probabilities: Tensor, victims: Tensor, rates: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return losses [m], their direction [m, B, C, H, W], the unit of the weights [m], and `Match.scale`."""
        match = self.matching(images, probabilities, victims, rates)
        errors, slopes = zip(*map(self.statistics, *self._pieces(images, victims)), strict=True)
        open_ = match.loss + self.settings.statistics * torch.cat(errors)
        variation, gradient = total_variation(images)
        gradient.mul_((self.settings.tv * open_).view(-1, 1, 1, 1, 1)).add_(match.by_images)
        gradient.add_(torch.cat(slopes), alpha=self.settings.statistics)
        return open_ * (self.settings.tv * variation).exp(), gradient, open_, match.scale

    def _pieces(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(tensor.split(self.matching.piece) for tensor in tensors)


def _targets(observation: Observation) -> Tensor:
    if observation.statistics.shape[1]:
        return observation.statistics
    module = observation.model.module
    if module.training:
        raise ConfigError("gradinversion needs the batch-norm statistics, which the victims did not send")
    return batch_norm.averages(module).expand(observation.victims, -1)
