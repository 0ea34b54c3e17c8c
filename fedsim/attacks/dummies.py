"""Dummy batches as the flat variables of an optimiser: the images and, where the labels are unknown, their logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.gradient_matching import GradientMatching
from fedsim.attacks.labels import one_hot
from fedsim.privacy.observation import Observation
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


class Dummies:
    """Translates between rows of variables [m, n] and dummy batches of the victims of one observation."""

    def __init__(self, observation: Observation, labels: Tensor | None) -> None:
        """Take the labels [N, B] if they are known or recovered, or None to search for them jointly."""
        self.observation, self.labels = observation, labels
        self.shape = (observation.batch_size, *observation.model.shape)
        self.pixels = math.prod(self.shape)
        self.classes = observation.model.classes

    def start(self, start: Start, restart: int, dtype: torch.dtype) -> Tensor:
        """Draw the variables of all victims [N, n], each from its own stream."""
        logits = 0 if self.labels is not None else self.observation.batch_size * self.classes
        rows = []
        for seed in self.observation.seeds:
            generator = torch_stream(seed, Purpose.ATTACK, restart)
            pixels = torch.randn(self.pixels, generator=generator).mul_(start.spread).add_(start.mean)
            rows.append(torch.cat([pixels, torch.randn(logits, generator=generator).mul_(start.logit_spread)]))
        return torch.stack(rows).to(self.observation.weights.device, dtype)

    def images(self, variables: Tensor) -> Tensor:
        """Return the images [m, B, C, H, W] in rows of variables."""
        return variables[:, : self.pixels].reshape(-1, *self.shape)

    def probabilities(self, variables: Tensor, victims: Tensor) -> Tensor:
        """Return the soft labels [m, B, classes] that rows of variables stand for."""
        if self.labels is not None:
            return one_hot(self.labels[victims], self.classes, variables)
        return variables[:, self.pixels :].reshape(-1, self.shape[0], self.classes).softmax(-1)

    def evaluate(self, matching: GradientMatching, variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matching losses [m] of rows of variables and their gradients [m, n]."""
        p = self.probabilities(variables, victims)
        match = matching(self.images(variables), p, victims)
        if self.labels is not None:
            return match.loss, match.by_images.flatten(1)
        by_p = match.by_probabilities
        by_logits = p * (by_p - (p * by_p).sum(-1, keepdim=True))
        return match.loss, torch.cat([match.by_images.flatten(1), by_logits.flatten(1)], 1)

    def found_labels(self, variables: Tensor) -> Tensor:
        """Return the labels [N, B] that the victims' variables [N, n] stand for."""
        everyone = torch.arange(len(variables), device=variables.device)
        return self.probabilities(variables, everyone).argmax(-1)
