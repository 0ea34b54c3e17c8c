"""The learned inverter: a network from gradients to images, trained on public images through the defense."""

import time
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings
from fedsim.attacks.gradient_features import GradientFeatures
from fedsim.attacks.gradient_matching import kept_parameters
from fedsim.attacks.inverter_network import Examples, InverterNetwork, Trained, train
from fedsim.attacks.learning import LearningContext
from fedsim.data.public import PublicSource
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import Adversary, Observation, Reconstruction

HELD_OUT = 0.1
"""Share of the public images that training never sees, and that decide when it ends."""
COMPONENT_BYTES = 256 * 2**20
"""Gradients from which principal components are taken: up to this size, and to `COMPONENT_GRADIENTS`."""
COMPONENT_GRADIENTS = 4000
MOST_IMAGES = 16
"""Images a gradient, at most: beyond, too many orders of a batch look alike."""
SPLIT, COMPONENTS, EXAMPLES, TRAINING = range(4)
"""What the streams of a `LearningContext` are for."""


class InverterConfig(AttackSettings):
    """Learned inversion: a network from gradients to images, trained on public images through the defense."""

    name: Literal["inverter"] = "inverter"
    public: PublicSource = "test"
    """Where the public images come from: `test`, the test images of the clients' data set (an attacker with public
    images of the same distribution), or all images of another data set that no client holds."""
    images: int | None = Field(default=None, ge=20)
    """Public images used, at most; null: all."""
    draws: int = Field(default=4, ge=1)
    """Times that each public image is protected, with fresh draws each."""
    components: int = Field(default=768, ge=1)
    """Principal components that stand for a gradient, shared evenly by its parameters, or their slices."""
    width: int = Field(default=512, ge=1)
    """Width of the two hidden layers."""
    steps: int = Field(default=800, ge=1)
    """Steps of training, at most."""
    batch: int = Field(default=128, ge=1)
    """Gradients a step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Largest step size of AdamW."""

    @model_validator(mode="after")
    def _no_restarts(self) -> Self:
        if self.restarts != 1:
            raise ValueError("restarts: a network is applied once")
        return self

    @property
    def public_source(self) -> PublicSource:
        """See `AttackSettings`."""
        return self.public

    @property
    def simulates_defense(self) -> bool:
        """See `AttackSettings`: who knows the defense trains through it."""
        return True

    def own_strategies(self, adversary: Adversary) -> tuple[str, ...]:
        """See `AttackSettings`: secrets of one round say nothing of the draws to train on."""
        return ("simulated", "simulated_average") if adversary == "adaptive" else ()

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: batches are not too large, and `ignore` leaves something."""
        kept_parameters(model.layout, self.ignore)
        if batch_size > MOST_IMAGES:
            raise ConfigError(f"inverter: at most {MOST_IMAGES} images a gradient, not {batch_size}")

    def check_unknown_rate(self) -> None:
        """See `AttackSettings.check_unknown_rate`: the public gradients are made at the clients' rate."""
        raise ConfigError("inverter: it trains on local steps at the clients' learning rate, which must be known")

    def check_public(self, count: int, batch_size: int) -> None:
        """See `AttackSettings.check_public`: a batch to learn from and one to hold out."""
        used = min(count, self.images or count)
        if used < 2 * batch_size or used - _held_out(used) < batch_size:
            raise ConfigError(
                f"inverter: {used} public images are too few to learn from for gradients of {batch_size} image(s)"
            )

    def build(self) -> Attack:
        """Return the attack."""
        return Inverter(self)


def _held_out(images: int) -> int:
    return max(1, int(HELD_OUT * images))


class Inverter(Attack):
    """Learns by which images public gradients are explained, then reads the victims' images off theirs.

    The naive adversary trains on undefended gradients; one who knows the defense on gradients protected by its
    client half with fresh draws, in the public context of the round. What is learned depends on no victim.
    `loss` is the mean squared error on public images held out from training, in pixel units.

    Source: Wu, Chen, Guo and Weinberger, "Learning to Invert: Simple Adaptive Attacks for Gradient Inversion in
    Federated Learning", UAI 2023. Principal components in place of their hashing, and the gates, are ours.
    """

    def __init__(self, settings: InverterConfig, learned: Trained | None = None) -> None:
        """Take the settings, and what `learn` returned if it has been called."""
        self.settings, self.learned = settings, learned

    def taught(self, learned: Trained) -> Attack:
        """See `Attack`."""
        return Inverter(self.settings, learned)

    def learn(self, context: LearningContext) -> Trained:
        """See `Attack`."""
        settings = self.settings
        settings.check_public(context.size, context.batch_size)
        order = torch.randperm(context.size, generator=context.generator(SPLIT), device=context.weights.device)[
            : settings.images
        ]
        held = _held_out(len(order))
        features = self._features(context, order[held:])
        raw = self._examples(context, features, order[held:], settings.draws, 0)
        features.standardise(*raw[:2])
        learning = Examples(*features.scaled(*raw[:2]), raw[2], context.take)
        unseen = self._examples(context, features, order[:held], 1, 1)
        held_out = Examples(*features.scaled(*unseen[:2]), unseen[2], context.take)
        mean = context.take(order[held:, None])[0].mean((0, 1))
        network = InverterNetwork(
            features, mean, context.batch_size, context.model.classes, settings.width, context.seed
        )
        rate, stream = settings.learning_rate, context.generator(TRAINING)
        trained = train(network, learning, held_out, settings.steps, settings.batch, rate, stream)
        trained.network.cpu()
        return trained

    def _features(self, context: LearningContext, images: Tensor) -> GradientFeatures:
        """Return the features of gradients, their components taken from some of the public images."""
        most = max(2, COMPONENT_BYTES // (4 * context.weights.numel()))
        stream = context.generator(COMPONENTS)
        batches = context.batches(images, min(most, COMPONENT_GRADIENTS, len(images)), stream)
        gradients = torch.cat([part for _, part in context.pieces(batches)])
        blocks = self._blocks(context)
        return GradientFeatures(gradients, blocks, self.settings.components, stream)

    def _blocks(self, context: LearningContext) -> list[slice]:
        """Cut the gradient into parameters, and these where the defense says that it cuts them."""
        layout = context.model.layout
        cuts: list[int] = []
        if context.knowledge and "slice_bounds" in context.knowledge.public:
            cuts = context.knowledge.public["slice_bounds"].tolist()
        blocks = []
        for name in kept_parameters(layout, self.settings.ignore):
            span = layout.span(name)
            edges = sorted({span.start, span.stop, *(c for c in cuts if span.start < c < span.stop)})
            blocks += [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
        return blocks

    @staticmethod
    def _examples(
        context: LearningContext, features: GradientFeatures, images: Tensor, draws: int, part: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return raw components [n, r], leftovers [n, k] and batches [n, B] of images seen `draws` times each."""
        stream = context.generator(EXAMPLES, part)
        seen = [
            (*features.raw(context.observed(batches, gradients, stream)), batches)
            for batches, gradients in context.pieces(context.batches(images, len(images), stream))
            for _ in range(draws if context.draws_differ else 1)
        ]
        components, leftovers, batches = (torch.cat(parts) for parts in zip(*seen, strict=True))
        return components, leftovers, batches

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """See `Attack`."""
        if self.learned is None:
            raise ConfigError("inverter has learned nothing: it needs public images")
        for victim, finite in enumerate(torch.isfinite(observation.gradients).all(1).tolist()):
            if not finite:
                raise ConfigError(f"the gradient of victim {victim} holds values that are not finite")
        began = time.perf_counter()
        learned, device = self.learned, observation.weights.device
        images, logits = learned.network.to(device)(observation.gradients.to(observation.weights))
        every = torch.ones(observation.victims, device=device)
        return Reconstruction(
            images=images.clamp(0, 1),
            labels=logits.argmax(-1),
            loss=every * learned.error,
            iterations=every.long() * learned.steps,
            stalled=torch.zeros_like(every, dtype=torch.bool),
            exhausted=every.bool() & learned.exhausted,
            seconds=time.perf_counter() - began,
        )
