"""DLG exactly as published, to compare with; its search often stalls (see `dlg`)."""

import time
from functools import partial

import torch
from torch import Tensor

from fedsim.attacks.base import Attack, AttackSettings
from fedsim.attacks.dummies import EXACT, STANDARD_NORMAL, Dummies, Found
from fedsim.attacks.gradient_matching import GradientMatching, SquaredError, loss_at
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
        dummies = Dummies(observation, None)
        matching = GradientMatching(observation, partial(SquaredError, relative=False), self.settings.ignore)
        relative = GradientMatching(observation, SquaredError, self.settings.ignore)
        best: Found | None = None
        for restart in range(self.settings.restarts):
            start = dummies.start(dummies.everyone, STANDARD_NORMAL, restart, torch.float32)
            parts = [_search(dummies, matching, relative, v, start[v]) for v in dummies.everyone.split(1)]
            found = Found.join(parts)
            best = found if best is None else best.improved(dummies.everyone, found)
        assert best is not None
        return dummies.reconstruction(best, time.perf_counter() - began)


def _search(
    dummies: Dummies, matching: GradientMatching, relative: GradientMatching, victim: Tensor, start: Tensor
) -> Found:
    x = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([x], lr=1, max_iter=INNER, history_size=HISTORY)

    def closure() -> float:
        loss, x.grad = dummies.evaluate(matching, x.detach(), victim)
        return float(loss)

    losses: list[float] = []
    last = start
    for _ in range(OUTER):
        losses.append(float(optimiser.step(closure)))
        stuck = torch.equal(x.detach(), last)
        if stuck or not torch.isfinite(x).all():
            break
        last = x.detach().clone()
    loss, _ = dummies.evaluate(relative, last, victim)
    mark = losses[-min(len(losses), OUTER // 10)]
    falling = len(losses) == OUTER and losses[-1] < (1 - SIGNIFICANT) * mark
    steps = optimiser.state[x]["n_iter"]
    flag = torch.tensor([falling], device=loss.device)
    return Found(last, loss, torch.full_like(victim, steps), ~flag & (loss > EXACT), flag)
