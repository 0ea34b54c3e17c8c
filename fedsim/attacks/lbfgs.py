"""L-BFGS with a strong-Wolfe line search for many independent problems at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.history import History
from fedsim.attacks.wolfe import Search

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps points [m, n] of the problems [m] (their indices) to losses [m] and gradients [m, n]."""

UNCURVED = 1e-10
"""Least cosine between a step and its change of gradient for the pair to tell anything about curvature."""

PATIENCE = 5
"""Steps in a row that must promise next to nothing before a point counts as stationary."""

SIGNIFICANT = 0.01
"""A loss still falls if the last tenth of the budget lowered it by at least this share."""


@dataclass(frozen=True)
class LBFGS:
    """Settings.

    Attributes:
        iterations: Most steps of one problem.
        history: Curvature pairs kept.
        solved: A problem is solved at this loss; scale the losses so that it means something.
        stationary: A point is stationary when the quasi-Newton step promises to lower the loss by no more than
            this share of it (half the Newton decrement, −½∇ᵀp / loss), `PATIENCE` times in a row. Unlike a bound
            on the gradient's norm, it is the same whatever the units of loss and variables: in gradient matching
            the norm falls by seven orders of magnitude while the image has hardly begun to appear.
    """

    iterations: int
    history: int = 100
    solved: float = 0.0
    stationary: float = 1e-4


@dataclass
class Minimum:
    """Where M problems ended; exactly one of the three flags of a problem is set.

    Attributes:
        x: Best point seen, shape [M, n].
        loss: Its loss, shape [M].
        iterations: Steps taken, shape [M].
        evaluations: Evaluations of the objective, shape [M].
        converged: Solved, or at a stationary point (see `LBFGS`), shape [M], bool.
        stalled: Neither, yet no step lowers the loss, or a tenth of the budget hardly did, shape [M], bool.
        exhausted: The budget ran out while the loss was still falling, shape [M], bool.
    """

    x: Tensor
    loss: Tensor
    iterations: Tensor
    evaluations: Tensor
    converged: Tensor
    stalled: Tensor
    exhausted: Tensor


@torch.no_grad()
def minimise(objective: Objective, start: Tensor, settings: LBFGS) -> Minimum:
    """Minimise M functions of n variables, none of which influences another.

    Every evaluation serves one trial step of every problem that is still at work, wherever in its line search
    that is; problems that end are retired. A value that is not finite counts as a bad trial.

    Args:
        objective: The losses and their gradients.
        start: Starting points, shape [M, n]; float64 starts are searched in float64.
        settings: Budget and thresholds.

    Returns:
        The best points seen and how each problem ended.

    Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithm 7.5 (L-BFGS).
    """
    run = _Run(objective, start, settings)
    while run.problems.numel():
        run.tick()
    return run.result


class _Run:
    """The problems still at work, a row each in every tensor of `ROWS`, and the results of all."""

    ROWS = (
        "problems",
        "x",
        "loss",
        "gradient",
        "direction",
        "idle",
        "iterations",
        "evaluations",
        "mark",
        "best_x",
        "best_loss",
    )

    def __init__(self, objective: Objective, start: Tensor, settings: LBFGS) -> None:
        self.objective, self.settings = objective, settings
        self.window = max(1, settings.iterations // 10)
        self.problems = torch.arange(len(start), device=start.device)
        self.x = self.best_x = start
        self.loss, self.gradient = objective(start, self.problems)
        self.best_loss = self.mark = self.loss
        self.iterations, self.idle = torch.zeros_like(self.problems), torch.zeros_like(self.problems)
        self.evaluations = torch.ones_like(self.problems)
        no = torch.zeros_like(self.problems, dtype=torch.bool)
        counts = self.iterations.clone(), self.evaluations.clone()
        self.result = Minimum(start.clone(), self.loss.clone(), *counts, no, no.clone(), no.clone())
        self.history = History(len(start), start.shape[1], settings.history, start)
        self.direction = -self.gradient
        self.search = self._searches(self.direction)
        self._retire(~no, ~(torch.isfinite(self.loss) & torch.isfinite(self.gradient).all(1)))

    def tick(self) -> None:
        """Evaluate the trial step of every problem, and let those whose search is done move on."""
        trial = self.x + self.search.step[:, None] * self.direction
        loss, gradient = self.objective(trial, self.problems)
        self.evaluations = self.evaluations + 1
        better = loss < self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_x = torch.where(better[:, None], trial, self.best_x)
        done = self.search.advance(loss, (gradient * self.direction).sum(1), gradient)
        if done.any():
            self._move(done)

    def _move(self, done: Tensor) -> None:
        step = torch.where(done, self.search.low_step, 0)
        moved, failed = step > 0, done & (step == 0)
        s = step[:, None] * self.direction
        y = torch.where(moved[:, None], self.search.low_gradient - self.gradient, 0)
        self.x = self.x + s
        self.gradient = torch.where(moved[:, None], self.search.low_gradient, self.gradient)
        self.loss = torch.where(moved, self.search.low_loss, self.loss)
        self.iterations = self.iterations + moved
        hopeless = failed & (self.history.count == 0)
        # A failed search may be the fault of stale curvature: try once more along the steepest descent.
        self.history.forget(failed)
        self.history.push(moved & ((s * y).sum(1) > UNCURVED * s.norm(dim=1) * y.norm(dim=1)), s, y)
        left = self._retire(done, hopeless)
        if len(left):
            self._aim(done[left])

    def _aim(self, rows: Tensor) -> None:
        """Start a new search for the problems `rows` [m], bool."""
        direction = self.history.direction(self.gradient)
        promise = -0.5 * (direction * self.gradient).sum(1)
        uphill = rows & ~(promise > 0)
        self.history.forget(uphill)
        direction = torch.where(uphill[:, None], -self.gradient, direction)
        small = (promise <= self.settings.stationary * self.loss.abs()) & (self.history.count > 0)
        self.idle = torch.where(rows, torch.where(small, self.idle + 1, 0), self.idle)
        self.direction = torch.where(rows[:, None], direction, self.direction)
        self.search.update(rows, self._searches(direction))

    def _searches(self, direction: Tensor) -> Search:
        slope = (direction * self.gradient).sum(1)
        fresh = self.history.count == 0
        step = torch.where(fresh, 1 / self.gradient.abs().sum(1), 1)
        finest = torch.finfo(self.x.dtype).eps * (self.x / direction).abs().nan_to_num(torch.inf).amin(1)
        return Search.start(step, self.loss, slope, finest, self.gradient)

    def _retire(self, done: Tensor, hopeless: Tensor) -> Tensor:
        """Write down the problems that end among those `done`, drop them, and return who is left."""
        settings = self.settings
        solved = (self.loss <= settings.solved) | (self.idle >= PATIENCE) | ~self.gradient.any(1)
        spent = self.iterations >= settings.iterations
        ends = done & (solved | hopeless | spent)
        falling = self.loss < (1 - SIGNIFICANT) * self.mark
        marked = done & (self.iterations % self.window == 0)
        self.mark = torch.where(marked, self.loss, self.mark)
        if ends.any():
            self._record(ends, solved, spent & falling & ~hopeless)
        left = (~ends).nonzero()[:, 0]
        if len(left) < len(ends):
            for name in self.ROWS:
                setattr(self, name, getattr(self, name)[left])
            self.search.select(left)
            self.history.select(left)
        return left

    def _record(self, ends: Tensor, solved: Tensor, exhausted: Tensor) -> None:
        result, at = self.result, self.problems[ends]
        result.x[at], result.loss[at] = self.best_x[ends], self.best_loss[ends]
        result.iterations[at], result.evaluations[at] = self.iterations[ends], self.evaluations[ends]
        result.converged[at] = solved[ends]
        result.exhausted[at] = (exhausted & ~solved)[ends]
        result.stalled[at] = ~(solved | exhausted)[ends]
