"""Deep Leakage from Gradients: search images (and labels) whose gradient is the one that was sent, by L-BFGS."""

import time
from dataclasses import dataclass, fields
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings
from fedsim.attacks.dummies import MID_GREY, Dummies
from fedsim.attacks.gradient_matching import BalancedError, GradientMatching, SquaredError
from fedsim.attacks.lbfgs import LBFGS, minimise
from fedsim.attacks.published_dlg import PublishedDLG
from fedsim.privacy.observation import Observation, Reconstruction

EXACT = 1e-9
"""Relative squared error below which the gradient must have been sent as it was: no defense leaves so little.

From there on every weighting of its parts has the same solution, and the search goes on with the parts balanced.
With PyTorch's initialisation the first layer, which knows most about the image, holds as little as 1e-12 of the
squared norm, less than float32 resolves beside the last layer.
"""


class LBFGSAttackSettings(AttackSettings):
    """What attacks that search by L-BFGS have in common."""

    iterations: int = Field(default=1500, ge=1)
    """Most L-BFGS steps of one search; most searches need far fewer and stop by themselves."""
    history: int = Field(default=50, ge=1)
    """Curvature pairs that L-BFGS keeps."""
    tolerance: float = Field(default=1e-10, ge=0)
    """Loss, relative to that of a gradient of zero, at which a victim counts as solved."""
    precision: Literal["float32", "float64"] = "float32"
    """Floating-point numbers of the search."""


class DLGConfig(LBFGSAttackSettings):
    """Deep Leakage from Gradients (Zhu et al., NeurIPS 2019): images and soft labels together, squared error."""

    name: Literal["dlg"] = "dlg"
    published: bool = False
    """The original's search, stalls included: no line search, unscaled loss, N(0, 1) start, 300 × 20 steps."""

    def build(self) -> Attack:
        """Return the attack."""
        return PublishedDLG(self) if self.published else DLG(self)


@dataclass
class Found:
    """What a search found for k victims; see `Reconstruction` for the flags."""

    variables: Tensor
    loss: Tensor
    iterations: Tensor
    stalled: Tensor
    exhausted: Tensor

    def improve(self, rows: Tensor, other: "Found") -> None:
        """Take over what `other`, the outcome for the victims `rows`, has at a lower loss."""
        better = other.loss < self.loss[rows]
        for field in fields(self):
            getattr(self, field.name)[rows[better]] = getattr(other, field.name)[better]


class DLG(Attack):
    """Matches gradients by L-BFGS with a strong-Wolfe line search.

    Victims that are not solved are tried again from another start, up to `restarts` times in all; the start with
    the lowest loss counts.

    Source: Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019. Start, line search, scale of the loss and
    stopping rules are ours: with the original's the search stalls (see `published`).
    """

    def __init__(self, settings: LBFGSAttackSettings) -> None:
        """Take the settings."""
        self.settings = settings

    def labels(self, observation: Observation) -> Tensor | None:
        """Return the labels to assume, [N, B], or None to search for them as well."""
        return None

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """See `Attack`."""
        began = time.perf_counter()
        dummies = Dummies(observation, self.labels(observation))
        best = self._search(dummies, 0, torch.arange(observation.victims))
        for restart in range(1, self.settings.restarts):
            unsolved = (best.loss > EXACT).nonzero()[:, 0]
            if len(unsolved):
                best.improve(unsolved, self._search(dummies, restart, unsolved))
        return dummies.reconstruction(...)

    def _search(self, dummies: Dummies, restart: int, victims: Tensor) -> Found:
        settings, observation = self.settings, dummies.observation
