"""Deep Leakage from Gradients: search images (and labels) whose gradient is the one that was sent, by L-BFGS."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings, LabelSource
from fedsim.attacks.distances import BalancedError, Distance, SquaredError, Targets
from fedsim.attacks.dummies import EXACT, FOUND, MID_GREY, Dummies, Found, refuse_joint
from fedsim.attacks.gradient_matching import GradientMatching, loss_at
from fedsim.attacks.labels import labels_from, last_linear
from fedsim.attacks.lbfgs import LBFGS, minimise
from fedsim.attacks.published_dlg import PublishedDLG
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation, Reconstruction


class LBFGSAttackSettings(AttackSettings):
    """What attacks that search by L-BFGS have in common."""

    iterations: int = Field(default=1500, ge=1)
    """Most L-BFGS steps of one search; most searches need far fewer and stop by themselves."""
    history: int = Field(default=50, ge=1)
    """Curvature pairs that L-BFGS keeps."""
    tolerance: float = Field(default=1e-6, ge=0)
    """Loss at which a victim counts as solved, relative to that of a mid-grey image: about 45 dB."""
    precision: Literal["auto", "float32", "float64"] = "auto"
    """Floating-point numbers of the search; `auto`: float32, and float64 for victims at which that stalls."""


class DLGConfig(LBFGSAttackSettings):
    """Deep Leakage from Gradients (Zhu et al., NeurIPS 2019): images and soft labels together, squared error."""

    name: Literal["dlg"] = "dlg"
    published: bool = False
    """The original's search, stalls included: no line search, unscaled loss, N(0, 1) start, 300 × 20 steps."""
    labels: Literal["joint", "known", "recovered"] = "joint"
    """`joint`: searched together with the images; `known`: given; `recovered`: from the last layer's gradient."""

    @model_validator(mode="after")
    def _published_is_joint(self) -> Self:
        if self.published and self.labels != "joint":
            raise ValueError("published: the original searches labels and images together; leave labels joint")
        return self

    @property
    def knows_labels(self) -> bool:
        """Whether labels are given."""
        return self.labels == "known"

    @property
    def takes_strategies(self) -> bool:
        """The original is left as it was."""
        return not self.published

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: labels are recovered from a last linear layer."""
        if self.labels == "recovered":
            last_linear(model)

    def check_unknown_rate(self) -> None:
        """See `AttackSettings.check_unknown_rate`: soft labels and the rate are known only together."""
        refuse_joint(self.labels == "joint")

    def build(self) -> Attack:
        """Return the attack."""
        if self.published:
            return PublishedDLG(self)
        return DLG(self, source=None if self.labels == "joint" else self.labels)


class DLG(Attack):
    """Matches gradients by L-BFGS with a strong-Wolfe line search.

    Victims that are not solved are tried again from another start, up to `restarts` times in all; the start with
    the lowest loss counts.

    Source: Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019. Start, line search, scale of the loss and
    stopping rules are ours: with the original's the search stalls (see `published`).
    """

    def __init__(
        self,
        settings: LBFGSAttackSettings,
        distance: Callable[[Targets], Distance] = SquaredError,
        source: LabelSource | None = None,
    ) -> None:
        """Take the settings, the distance to match by, and where labels come from if they are not searched for."""
        self.settings, self.distance, self.source = settings, distance, source

    def matching(self, distance: Callable[[Targets], Distance]) -> Attack:
        """See `Attack`."""
        return type(self)(self.settings, distance, self.source)

    def labels(self, observation: Observation) -> Tensor | None:
        """Return the labels to assume, [N, B], or None to search for them as well."""
        return None if self.source is None else labels_from(self.source, observation, "dlg")

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return loss_at(observation, self.distance, self.settings.ignore, images, labels)

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """See `Attack`."""
        began = time.perf_counter()
        run = _Run(observation, self.labels(observation), self.settings, self.distance)
        best = run.attempt(0, run.dummies.everyone)
        for restart in range(1, self.settings.restarts):
            unsolved = ((best.loss > EXACT) | best.stalled | best.exhausted).nonzero()[:, 0]
            if len(unsolved):
                best = best.improved(unsolved, run.attempt(restart, unsolved))
        return run.dummies.reconstruction(best, time.perf_counter() - began)


class _Run:
    """One observation under attack."""

    def __init__(
        self,
        observation: Observation,
        labels: Tensor | None,
        settings: LBFGSAttackSettings,
        distance: Callable[[Targets], Distance],
    ) -> None:
        self.observation, self.settings, self.distance = observation, settings, distance
        self.dummies = Dummies(observation, labels, settings.ignore)
        self.matchings: dict[tuple[Callable[[Targets], Distance], torch.dtype], GradientMatching] = {}

    def attempt(self, restart: int, victims: Tensor) -> Found:
        """Attack `victims` from one start each."""
        single = self.settings.precision != "float64"
        start = self.dummies.start(victims, MID_GREY, restart, torch.float32 if single else torch.float64)
        found = self._search(self.distance, start, victims, EXACT)
        exact = (found.loss <= EXACT).nonzero()[:, 0]
        if len(exact) == 0:
            return found
        return found.replaced(exact, self._refine(found.select(exact), victims[exact]))

    def _refine(self, found: Found, victims: Tensor) -> Found:
        """Go on from exact matches, with the parts of the gradient balanced.

        Where a gradient was sent as it was, every weighting of its parts has the same solution. With PyTorch's
        initialisation the first layer, which knows most about the image, holds as little as 1e-12 of the
        gradient's square: less than float32 resolves beside the last layer.
        """
        grey, _ = self._evaluate(BalancedError, self.dummies.greyed(found.variables), victims)
        end = self._search(BalancedError, found.variables, victims, self.settings.tolerance, grey)
        loss, _ = self._evaluate(self.distance, end.variables, victims)
        return replace(end.after(found.iterations), loss=loss)

    def _search(
        self,
        distance: Callable[[Targets], Distance],
        start: Tensor,
        victims: Tensor,
        solved: float,
        unit: Tensor | None = None,
    ) -> Found:
        """Minimise the distance, in units of `unit` [k], from `start` [k, n] on."""
        units = torch.ones_like(start[:, 0]) if unit is None else unit.to(start)

        def objective(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            loss, gradient = self._evaluate(distance, x, victims[rows])
            return loss / units[rows], gradient / units[rows, None]

        end = minimise(objective, start, LBFGS(self.settings.iterations, self.settings.history, solved))
        # Where the image is found already, a search that stops has only reached the end of its precision.
        stalled = end.stalled & (end.loss > FOUND)
        found = Found(end.x, end.loss, end.iterations, stalled, end.exhausted)
        stuck = stalled.nonzero()[:, 0]
        if self.settings.precision != "auto" or start.dtype == torch.float64 or len(stuck) == 0:
            return found
        finer = self._search(distance, end.x[stuck].double(), victims[stuck], solved, units[stuck])
        return found.replaced(stuck, finer.after(found.iterations[stuck]))

    def _evaluate(
        self, distance: Callable[[Targets], Distance], x: Tensor, victims: Tensor
    ) -> tuple[Tensor, Tensor]:
        key = distance, x.dtype
        if key not in self.matchings:
            self.matchings[key] = GradientMatching(self.observation, distance, self.settings.ignore, x.dtype)
        return self.dummies.evaluate(self.matchings[key], x, victims)
