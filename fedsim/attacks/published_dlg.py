"""DLG exactly as published, to compare with; its search often stalls (see `dlg`)."""

import time
from functools import partial

import torch
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings
from fedsim.attacks.distances import BalancedError, SquaredError
from fedsim.attacks.dummies import FOUND, STANDARD_NORMAL, Dummies, Found
from fedsim.attacks.gradient_matching import GradientMatching, loss_at
from fedsim.attacks.lbfgs import SIGNIFICANT
from fedsim.privacy.observation import Observation, Reconstruction

OUTER, INNER, HISTORY = 300, 20, 100
"""Calls of the optimiser, its steps a call, and its curvature pairs."""


class PublishedDLG(Attack):
    """The original's optimiser, torch's L-BFGS without a line search, on one victim after the other.

    The loss is the plain Σ(g − t)², so that the optimiser's absolute thresholds act as they did; what is
    reported is the same loss relative to ‖t‖², as everywhere.

    Source: Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019, and its published code.
    """

    def __init__(self, settings: AttackSettings) -> None:
        """Take the settings, of which `restarts` and `ignore` have a meaning here."""
        self.settings = settings

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return loss_at(observation, SquaredError, self.settings.ignore, images, labels)

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """See `Attack`."""
        began = time.perf_counter()
        run = _Run(observation, self.settings.ignore)
        best = run.attempt(0)
        for restart in range(1, self.settings.restarts):
            best = best.improved(run.dummies.everyone, run.attempt(restart))
        return run.dummies.reconstruction(best, time.perf_counter() - began)


class _Run:
    """One observation under attack."""

    def __init__(self, observation: Observation, ignore: tuple[str, ...]) -> None:
        self.dummies = Dummies(observation, None)
        self.plain, self.relative, self.balanced = (
            GradientMatching(observation, distance, ignore)
            for distance in (partial(SquaredError, relative=False), SquaredError, BalancedError)
        )

    def attempt(self, restart: int) -> Found:
        """Attack all victims from one start each."""
        start = self.dummies.start(self.dummies.everyone, STANDARD_NORMAL, restart, torch.float32)
        return Found.join([self._search(victim, start[victim]) for victim in self.dummies.everyone.split(1)])

    def _search(self, victim: Tensor, start: Tensor) -> Found:
        x = start.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([x], lr=1, max_iter=INNER, history_size=HISTORY)

        def closure() -> float:
            loss, x.grad = self.dummies.evaluate(self.plain, x.detach(), victim)
            return float(loss)

        losses: list[float] = []
        last = start
        while len(losses) < OUTER:
            losses.append(float(optimiser.step(closure)))
            if torch.equal(x, last) or not torch.isfinite(x).all():
                break
            last = x.detach().clone()
        falling = len(losses) == OUTER and losses[-1] < (1 - SIGNIFICANT) * losses[-OUTER // 10]
        exhausted = torch.full_like(victim, falling, dtype=torch.bool)
        loss, _ = self.dummies.evaluate(self.relative, last, victim)
        parts, _ = self.dummies.evaluate(self.balanced, last, victim)
        grey, _ = self.dummies.evaluate(self.balanced, self.dummies.greyed(last), victim)
        steps = torch.full_like(victim, optimiser.state[x]["n_iter"])
        return Found(last, loss, steps, ~exhausted & ~(parts <= FOUND * grey), exhausted)
