"""A generative prior: search the latents of a generator, trained on public images, for what was sent."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedsim.attacks.base import Attack, AttackSettings, LabelSource
from fedsim.attacks.box_adam import ProblemAdam
from fedsim.attacks.distances import CosineDistance, Distance, Targets
from fedsim.attacks.generator import Examples, Generator, Trained, train
from fedsim.attacks.gia import OBJECTIVES
from fedsim.attacks.gradient_matching import GradientMatching, kept_parameters, loss_at, rates_by_scale
from fedsim.attacks.labels import labels_from, last_linear, one_hot
from fedsim.attacks.learning import LearningContext
from fedsim.attacks.refinement import WARM_UP, entries, refined
from fedsim.attacks.schedules import warm_cosine
from fedsim.data.public import PublicSource
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation, Reconstruction

HELD_OUT = 0.1
"""Share of the public images that training never sees, and that tell how far the generator reaches."""
FEWEST = 20
"""Public images, at least."""
SPLIT, TRAINING = range(2)
"""What the streams of a `LearningContext` are for."""


class GenerativeConfig(AttackSettings):
    """Generative prior (after GGL, CVPR 2022, and GIAS, NeurIPS 2021): the latents of a generator, then pixels."""

    name: Literal["generative"] = "generative"
    public: PublicSource = "test"
    """Where the public images come from: `test`, the test images of the clients' data set (an attacker with public
    images of the same distribution), or all images of another data set that no client holds."""
    images: int | None = Field(default=None, ge=FEWEST)
    """Public images used, at most; null: all."""
    latents: int = Field(default=64, ge=1)
    """Latents of the generator: more of them reach more images, and assume less of them."""
    width: int = Field(default=512, ge=1)
    """Width of the hidden layers of generator and encoder."""
    conditional: bool = True
    """Whether the generator draws images of a given class. Public images of other classes want `false`."""
    steps: int = Field(default=800, ge=1)
    """Steps of training."""
    batch: int = Field(default=128, ge=1)
    """Images a step of training."""
    training_rate: float = Field(default=2e-3, gt=0)
    """Largest step size of the training."""
    restarts: int = Field(default=2, ge=1)
    """Searches a victim: the first from the most probable image, the others from random ones."""
    iterations: int = Field(default=300, ge=1)
    """Adam steps of the search for latents."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Largest step size of that search, in standard deviations of a latent; it falls to 0 along a cosine."""
    prior: float = Field(default=1.0, ge=0)
    """Weight of the prior, of latents and of pixels: 1 is the most probable image if the gradient carries Gaussian
    noise of an unknown strength, 0 trusts the gradient alone."""
    refine: Literal["pixels", "none"] = "pixels"
    """`pixels`: goes on from the generator's image, from which pixels may differ as far as those of held-out
    public images do; `none`: ends at the generator's image."""
    refine_iterations: int = Field(default=300, ge=1)
    """Adam steps on the pixels."""
    refine_rate: float = Field(default=0.02, gt=0)
    """Their largest size, in pixel units; it falls to 0 along a cosine."""
    objective: Literal["cosine", "layer_cosine", "l1"] = "cosine"
    """The distance between gradients; see `gia`."""
    labels: LabelSource = "known"
    """`known`, or `recovered` from the last layer's gradient."""

    @property
    def knows_labels(self) -> bool:
        """Whether labels are given."""
        return self.labels == "known"

    @property
    def public_source(self) -> PublicSource:
        """See `AttackSettings`."""
        return self.public

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: `ignore` leaves something; labels are recovered from a last linear layer."""
        kept_parameters(model.layout, self.ignore)
        if self.labels == "recovered":
            last_linear(model)

    def check_public(self, count: int, batch_size: int) -> None:
        """See `AttackSettings.check_public`: enough to learn from."""
        if count < FEWEST:
            raise ConfigError(f"generative: {count} public images are too few to learn from, it takes {FEWEST}")

    def build(self) -> Attack:
        """Return the attack."""
        return Generative(self, OBJECTIVES[self.objective])


class Generative(Attack):
    """Moves latents by Adam until the gradient of what the generator draws is the one that was sent.

    With D entries to match, the search minimises D/2 · log(distance) + prior/2 · ‖z‖²: under a squared distance
    the most probable latents z ~ N(0, 1) where the strength of Gaussian noise is unknown. The generator is the
    same for every adversary, and fixed from then on. From its image the pixels are searched, held as near to it as
    held-out public images are to theirs (`refined`). `loss` is the distance times exp(prior · (‖z‖² + r) / D), r
    the penalty of the pixels, which has the same minima; at the truth ‖z‖² and r are taken for their means.

    Sources: Li, Zhang, Liu and Liu, "Auditing Privacy Defenses in Federated Learning via Generative Gradient
    Leakage", CVPR 2022 (latents; their defense's transform is here a strategy of the adversary); Jeon et al.,
    "Gradient Inversion with Generative Image Prior", NeurIPS 2021 (latents first, then beyond the generator; they
    go on with its parameters). The weight of the prior, and pixels with a prior of their own in place of
    parameters, are ours.
    """

    def __init__(
        self,
        settings: GenerativeConfig,
        distance: Callable[[Targets], Distance] = CosineDistance,
        learned: Trained | None = None,
    ) -> None:
        """Take the settings, the distance to match by, and what was learned, if anything."""
        self.settings, self.distance, self.learned = settings, distance, learned

    def taught(self, learned: Trained) -> "Generative":
        """See `Attack`."""
        return Generative(self.settings, self.distance, learned)

    def matching(self, distance: Callable[[Targets], Distance]) -> Attack:
        """See `Attack`."""
        return Generative(self.settings, distance, self.learned)

    def learn(self, context: LearningContext) -> Trained:
        """See `Attack`: train the generator; weights, defense and adversary do not matter."""
        settings = self.settings
        settings.check_public(context.size, context.batch_size)
        stream = context.generator(SPLIT)
        order = torch.randperm(context.size, generator=stream, device=stream.device)[: settings.images]
        images, labels = context.take(order)
        every = Examples(images, F.one_hot(labels, context.model.classes).to(images))
        held = int(HELD_OUT * len(order))
        trained = train(
            every.select(slice(held, None)),
            every.select(slice(held)),
            settings.latents,
            settings.width,
            settings.conditional,
            settings.steps,
            settings.batch,
            settings.training_rate,
            context.seed,
            context.generator(TRAINING),
        )
        trained.generator.cpu()
        return trained

    def report(self, learned: Trained) -> str:
        """See `Attack`: how far the generator reaches."""
        return (
            f"generator of {learned.generator.latents} latents from {learned.images} public images; "
            f"{learned.held_out} held out are {learned.ceiling:.1f} dB from its nearest (the prior's ceiling)"
        )

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`; the prior counts as for a typical image, 1 for each latent and each pixel searched."""
        settings = self.settings
        distance = loss_at(observation, self.distance, settings.ignore, images, labels)
        typical = settings.latents * images.shape[1]
        if settings.refine == "pixels":
            typical += images[0].numel()
        return distance * (settings.prior * typical / entries(observation, settings.ignore)).exp()

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """Attack all victims × restarts at once; see `Attack`."""
        if self.learned is None:
            raise ConfigError("generative has learned nothing: it needs public images")
        generator = self.learned.generator.to(observation.weights.device)
        shape, wanted = list(generator.shape), list(observation.model.shape)
        if shape != wanted:
            raise ConfigError(f"generative draws images of {shape}, the model takes {wanted}")
        began = time.perf_counter()
        labels = labels_from(self.settings.labels, observation, "generative")
        found = self.search(generator, observation, labels)
        if self.settings.refine == "pixels":
            found = self._refined(found, observation, self.learned)
        return replace(found, seconds=time.perf_counter() - began)

    def search(self, generator: Generator, observation: Observation, labels: Tensor) -> Reconstruction:
        """Return the generator's images that match best, given labels [N, B]."""
        settings = self.settings
        search = ProblemAdam(observation, settings.restarts, settings.iterations)
        matching = GradientMatching(observation, self.distance, settings.ignore)
        every = one_hot(labels, observation.model.classes, observation.weights)
        probabilities, size = every[search.victims], entries(observation, settings.ignore)[search.victims]
        search.begin(self._start(search, observation, generator.latents))
        with torch.no_grad():
            images = generator(search.points, probabilities)
        search.rates = rates_by_scale(matching, images, probabilities, search.victims)
        for step in range(settings.iterations):
            with torch.enable_grad():
                latents = search.points.detach().requires_grad_()
                images = generator(latents, probabilities)
            match = matching(images.detach(), probabilities, search.victims, search.rates)
            (slope,) = torch.autograd.grad(images, latents, match.by_images)
            square = search.points.square().flatten(1).sum(1)
            search.note(match.loss * (settings.prior * square / size).exp(), match.scale)
            weight = (size / 2 / match.loss.clamp_min(torch.finfo(size.dtype).tiny)).view(-1, 1, 1)
            slope = (weight * slope).nan_to_num_().add_(search.points, alpha=settings.prior)
            search.move(slope, warm_cosine(settings.learning_rate, step, settings.iterations, WARM_UP))
        with torch.no_grad():
            drawn = generator(search.best[search.chosen()], every)
        return search.reconstruction(labels, 0.0, drawn)

    def _start(self, search: ProblemAdam, observation: Observation, latents: int) -> Tensor:
        """Return the latents to start from, [M, B, latents]: 0 for each victim's first search."""
        shape = (observation.batch_size, latents)
        draws = [torch.randn(shape, generator=own) for own in search.generators]
        start = torch.stack(draws).view(-1, search.restarts, *shape)
        start[:, 0] = 0
        return start.flatten(0, 1).to(observation.weights)

    def _refined(self, found: Reconstruction, observation: Observation, learned: Trained) -> Reconstruction:
        """Return what the search of pixels makes of the generator's images."""
        settings = self.settings
        return refined(
            found,
            observation,
            self.distance,
            learned.residuals,
            settings.prior,
            settings.ignore,
            settings.refine_iterations,
            settings.refine_rate,
        )
