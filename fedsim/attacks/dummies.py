"""Dummy batches as the flat variables of an optimiser: images, and what else of them is unknown.

Behind the pixels come the logits of the labels where these are searched for, or the logarithm of the local
learning rate, beside a first estimate, where that is unknown. Both together are not: soft labels nearer to what
the model answers make the same update as a lower rate.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fedsim.attacks.distances import SquaredError
from fedsim.attacks.gradient_matching import GradientMatching, rates_by_scale
from fedsim.attacks.labels import one_hot
from fedsim.errors import ConfigError
from fedsim.privacy.observation import Observation, Reconstruction
from fedsim.randomness import Purpose, torch_stream


@dataclass(frozen=True)
class Start:
    """How dummies are drawn: N(mean, spread²) for pixels, N(0, logit_spread²) for the logits of the labels."""

    mean: float
    spread: float
    logit_spread: float


MID_GREY = Start(0.5, 0.1, 0.1)
"""Mid-grey with a little noise. What an observation hardly determines stays where it starts; noise stays noise."""

STANDARD_NORMAL = Start(0.0, 1.0, 1.0)
"""As in Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019."""


EXACT = 1e-8
"""Relative squared error below which a gradient must have been sent as it was: no defense leaves so little."""

FOUND = 1e-5
"""Balanced error, relative to that of a mid-grey image with the same label, of an image found to about 30 dB."""


RATE_UNIT = 0.01
"""What one unit of the variable that stands for a learning rate changes its logarithm by. The first estimate is
off by percents where pixels are off by tenths; a variable in natural units would be the stiffest by far, and the
search would spend its budget on it."""


@dataclass(frozen=True)
class Found:
    """What a search found for k victims; see `Reconstruction` for what the attributes mean."""

    variables: Tensor
    loss: Tensor
    iterations: Tensor
    stalled: Tensor
    exhausted: Tensor

    @classmethod
    def join(cls, parts: list["Found"]) -> "Found":
        """Put several victims' outcomes one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def replaced(self, rows: Tensor, other: "Found") -> "Found":
        """Return this with `rows`, an index, replaced by those of `other`, at this one's precision."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Found(*(mine.index_copy(0, rows, new.to(mine)) for mine, new in pairs))

    def after(self, iterations: Tensor) -> "Found":
        """Return this with the `iterations` [k] of an earlier stage added."""
        return replace(self, iterations=self.iterations + iterations)

    def improved(self, rows: Tensor, other: "Found") -> "Found":
        """Return this with those of `rows` replaced for which `other` has a lower loss."""
        better = (other.loss < self.loss[rows]).nonzero()[:, 0]
        return self.replaced(rows[better], other.select(better))

    def select(self, rows: Tensor) -> "Found":
        """Return the outcomes of some of the victims."""
        return Found(*(getattr(self, field.name)[rows] for field in fields(self)))


def refuse_joint(joint: bool) -> None:
    """See that labels are not searched for beside an unknown learning rate; ConfigError if they are."""
    if joint:
        raise ConfigError(
            "labels: joint: soft labels and an unknown learning rate are known only together; "
            "set labels to known or recovered, or give the rate"
        )


class Dummies:
    """Translates between rows of variables [m, n] and dummy batches of the victims of one observation."""

    def __init__(self, observation: Observation, labels: Tensor | None, ignore: tuple[str, ...] = ()) -> None:
        """Take the labels [N, B] if they are known or recovered, or None to search for them jointly.

        `ignore` are the patterns of parameters that are not matched; they do not tell the learning rate either.
        """
        self.observation, self.labels = observation, labels
        self.shape = (observation.batch_size, *observation.model.shape)
        self.pixels = math.prod(self.shape)
        self.classes = observation.model.classes
        self.first_rates: Tensor | None = None
        if observation.local.learning_rate is None:
            refuse_joint(labels is None)
            grey = torch.full((observation.victims, self.pixels), 0.5).to(observation.weights)
            self.nearest = GradientMatching(observation, SquaredError, ignore)
            arguments = self.images(grey), self.probabilities(grey, self.everyone), self.everyone
            self.first_rates = rates_by_scale(self.nearest, *arguments)

    def rates(self, variables: Tensor, victims: Tensor) -> Tensor | None:
        """Return the learning rates [m] that rows of variables stand for; None if the rate is known."""
        if self.first_rates is None:
            return None
        return self.first_rates[victims].to(variables) * (RATE_UNIT * variables[:, self.pixels]).exp()

    @property
    def everyone(self) -> Tensor:
        """All victims, [N]."""
        return torch.arange(self.observation.victims, device=self.observation.weights.device)

    def start(self, victims: Tensor, start: Start, restart: int, dtype: torch.dtype) -> Tensor:
        """Draw the variables of k victims [k, n], each from its own stream."""
        logits = 0 if self.labels is not None else self.observation.batch_size * self.classes
        rows = []
        for victim in victims.tolist():
            generator = torch_stream(self.observation.seeds[victim], Purpose.ATTACK, restart)
            pixels = torch.randn(self.pixels, generator=generator).mul_(start.spread).add_(start.mean)
            rest = torch.randn(logits, generator=generator).mul_(start.logit_spread)
            rows.append(torch.cat([pixels, rest if self.first_rates is None else torch.zeros(1)]))
        return torch.stack(rows).to(self.observation.weights.device, dtype)

    def images(self, variables: Tensor) -> Tensor:
        """Return the images [m, B, C, H, W] in rows of variables."""
        return variables[:, : self.pixels].reshape(-1, *self.shape)

    def greyed(self, variables: Tensor) -> Tensor:
        """Return the variables with all pixels mid-grey and the rest as it is."""
        pixels = torch.full_like(variables[:, : self.pixels], 0.5)
        return torch.cat([pixels, variables[:, self.pixels :]], 1)

    def probabilities(self, variables: Tensor, victims: Tensor) -> Tensor:
        """Return the soft labels [m, B, classes] that rows of variables stand for."""
        if self.labels is not None:
            return one_hot(self.labels[victims], self.classes, variables)
        return variables[:, self.pixels :].reshape(-1, self.shape[0], self.classes).softmax(-1)

    def evaluate(self, matching: GradientMatching, variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matching losses [m] of rows of variables and their gradients [m, n]."""
        p = self.probabilities(variables, victims)
        match = matching(self.images(variables), p, victims, self.rates(variables, victims))
        if self.first_rates is not None:
            by_rate = RATE_UNIT * match.by_log_rate[:, None]
            return match.loss, torch.cat([match.by_images.flatten(1), by_rate], 1)
        if self.labels is not None:
            return match.loss, match.by_images.flatten(1)
        by_p = match.by_probabilities
        by_logits = p * (by_p - (p * by_p).sum(-1, keepdim=True))
        return match.loss, torch.cat([match.by_images.flatten(1), by_logits.flatten(1)], 1)

    def reconstruction(self, found: Found, seconds: float) -> Reconstruction:
        """Return the outcome for all victims."""
        rates, images = None, self.images(found.variables).float()
        probabilities = self.probabilities(found.variables.float(), self.everyone)
        if self.first_rates is not None:
            assumed = self.rates(found.variables.float(), self.everyone)
            rates = self.nearest(images, probabilities, self.everyone, assumed).scale
        return Reconstruction(
            images=images,
            labels=probabilities.argmax(-1),
            loss=found.loss.float(),
            iterations=found.iterations,
            stalled=found.stalled,
            exhausted=found.exhausted,
            seconds=seconds,
            learning_rates=rates,
        )
