"""Deep Leakage from Gradients: search images (and labels) whose gradient is the one that was sent, by L-BFGS."""

import time
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings
from fedsim.attacks.dummies import EXACT, MID_GREY, Dummies, Found
from fedsim.attacks.gradient_matching import BalancedError, GradientMatching, SquaredError, loss_at
from fedsim.attacks.lbfgs import LBFGS, minimise
from fedsim.attacks.published_dlg import PublishedDLG
from fedsim.privacy.observation import Observation, Reconstruction


class LBFGSAttackSettings(AttackSettings):
    """What attacks that search by L-BFGS have in common."""

    iterations: int = Field(default=1500, ge=1)
    """Most L-BFGS steps of one search; most searches need far fewer and stop by themselves."""
    history: int = Field(default=50, ge=1)
    """Curvature pairs that L-BFGS keeps."""
    tolerance: float = Field(default=1e-11, ge=0)
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

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return loss_at(observation, SquaredError, self.settings.ignore, images, labels)

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """See `Attack`."""
        began = time.perf_counter()
        dummies = Dummies(observation, self.labels(observation))
        dtype = getattr(torch, self.settings.precision)
        plain, balanced = (
            GradientMatching(observation, distance, self.settings.ignore, dtype)
            for distance in (SquaredError, BalancedError)
        )
        best: Found | None = None
        for restart in range(self.settings.restarts):
            victims = dummies.everyone if best is None else (best.loss > EXACT).nonzero()[:, 0]
            if len(victims) == 0:
                break
            start = dummies.start(victims, MID_GREY, restart, dtype)
            found = self._refine(dummies, balanced, plain, victims, self._search(dummies, plain, victims, start))
            best = found if best is None else best.improved(victims, found)
        assert best is not None
        return dummies.reconstruction(best, time.perf_counter() - began)

    def _search(self, dummies: Dummies, matching: GradientMatching, victims: Tensor, start: Tensor) -> Found:
        settings = LBFGS(self.settings.iterations, self.settings.history, solved=EXACT)
        end = minimise(lambda x, rows: dummies.evaluate(matching, x, victims[rows]), start, settings)
        return Found(end.x, end.loss, end.iterations, end.stalled, end.exhausted)

    def _refine(
        self, dummies: Dummies, balanced: GradientMatching, plain: GradientMatching, victims: Tensor, found: Found
    ) -> Found:
        """Go on from the exact matches among `found`, with the parts of the gradient balanced.

        Where a gradient was sent as it was, every weighting of its parts has the same solution. With PyTorch's
        initialisation the first layer, which knows most about the image, holds as little as 1e-12 of the
        gradient's square: less than float32 resolves beside the last layer.
        """
        rows = (found.loss <= EXACT).nonzero()[:, 0]
        if len(rows) == 0:
            return found
        exact = victims[rows]
        settings = LBFGS(self.settings.iterations, self.settings.history, solved=self.settings.tolerance)
        end = minimise(lambda x, at: dummies.evaluate(balanced, x, exact[at]), found.variables[rows], settings)
        refined = Found(
            end.x,
            dummies.evaluate(plain, end.x, exact)[0],
            found.iterations[rows] + end.iterations,
            end.stalled & (end.loss > EXACT),  # below, only the floating-point numbers end
            end.exhausted,
        )
        return found.replaced(rows, refined)
