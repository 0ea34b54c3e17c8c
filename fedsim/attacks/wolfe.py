"""A strong-Wolfe line search for many problems at once: one trial step each, every time the objective is run."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

DECREASE = 1e-4
"""c₁: share of the predicted decrease that a step must bring."""

CURVATURE = 0.9
"""c₂: share of the slope that may be left after a step."""

MOST_TRIALS = 25
"""Trial steps in one search before it settles for the best that it has."""


@dataclass
class Search:
    """Line searches of m problems, each at its own stage; every attribute has a leading dimension m.

    A search first stretches the step until a minimum is bracketed, then zooms into the bracket. `low` is the end
    of the bracket with the lower loss, `high` the other; while stretching they are the last two trials. When a
    search is done its result is `low`; one that found nothing better than the start has `low_step` 0.

    Attributes:
        step: The trial step that must be evaluated next.
        loss: Loss at step 0.
        slope: Derivative along the direction at step 0, negative.
        finest: Width at which a bracket is too narrow to tell its ends apart.
        trials: Trials so far.
        zooming: Whether a minimum is bracketed.
        lazy: Whether the last trial fell close to an end of the bracket.
        low_step, low_loss, low_slope, low_gradient: The low end; the gradient has shape [m, n].
        high_step, high_loss, high_slope: The high end.

    Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithms 3.5 and 3.6.
    """

    step: Tensor
    loss: Tensor
    slope: Tensor
    finest: Tensor
    trials: Tensor
    zooming: Tensor
    lazy: Tensor
    low_step: Tensor
    low_loss: Tensor
    low_slope: Tensor
    low_gradient: Tensor
    high_step: Tensor
    high_loss: Tensor
    high_slope: Tensor

    @classmethod
    def start(cls, step: Tensor, loss: Tensor, slope: Tensor, finest: Tensor, gradient: Tensor) -> "Search":
        """Begin at step 0, with `step` [m] to be tried first."""
        zero, no = torch.zeros_like(loss), torch.zeros_like(loss, dtype=torch.bool)
        low = (zero, loss, slope, gradient)
        return cls(step, loss, slope, finest, zero.long(), no, no, *low, zero, loss, slope)

    def advance(self, loss: Tensor, slope: Tensor, gradient: Tensor) -> Tensor:
        """Take in the trial step's loss [m], slope [m] and gradient [m, n]; return who is done, [m].

        A loss that is not finite counts as too high.
        """
        self.trials = self.trials + 1
        seen = torch.isfinite(loss) & torch.isfinite(slope)
        loss = torch.where(seen, loss, torch.inf)
        slope = torch.where(seen, slope, torch.inf)
        short = loss > self.loss + DECREASE * self.step * self.slope
        worse = short | ((loss >= self.low_loss) & (self.trials > 1))
        accepted = ~worse & (slope.abs() <= -CURVATURE * self.slope)
        self._replace_ends(loss, slope, gradient, worse)
        self.zooming = self.zooming | worse | (slope >= 0)
        narrow = self.zooming & ((self.high_step - self.low_step).abs() <= self.finest)
        self._choose_step()
        return accepted | narrow | (self.trials >= MOST_TRIALS)

    def _replace_ends(self, loss: Tensor, slope: Tensor, gradient: Tensor, worse: Tensor) -> None:
        lower = ~worse | (loss < self.low_loss)
        turned = slope * (self.high_step - self.low_step) >= 0
        demoted = lower & (worse | ~self.zooming | turned)
        for name, trial in (("step", self.step), ("loss", loss), ("slope", slope)):
            low, high = getattr(self, f"low_{name}"), getattr(self, f"high_{name}")
            high = torch.where(demoted, low, torch.where(lower, high, trial))
            setattr(self, f"high_{name}", high)
            setattr(self, f"low_{name}", torch.where(lower, trial, low))
        self.low_gradient = torch.where(lower[:, None], gradient, self.low_gradient)

    def _choose_step(self) -> None:
        left, right = torch.minimum(self.low_step, self.high_step), torch.maximum(self.low_step, self.high_step)
        width = right - left
        wanted = self._cubic()
        inside = torch.where(torch.isfinite(wanted), _clamp(wanted, left, right), 0.5 * (left + right))
        margin = 0.1 * width
        near = torch.minimum(right - inside, inside - left) < margin
        # A trial close to an end hardly shrinks the bracket: let it pass once, then push it inwards.
        push = near & (self.lazy | (wanted <= left) | (wanted >= right))
        pushed = torch.where(right - inside < inside - left, right - margin, left + margin)
        # Where the slope has not flattened yet the cubic has no minimum ahead: go on in great strides.
        ahead = torch.where(wanted > right, wanted, torch.inf)
        stretched = _clamp(ahead, 2 * right, 10 * right)
        self.lazy = near & ~push & self.zooming
        self.step = torch.where(self.zooming, torch.where(push, pushed, inside), stretched)

    def _cubic(self) -> Tensor:
        """Minimum of the cubic through both ends; not finite where there is none."""
        width = self.high_step - self.low_step
        mean = self.low_slope + self.high_slope - 3 * (self.high_loss - self.low_loss) / width
        root = (mean * mean - self.low_slope * self.high_slope).sqrt() * width.sign()
        share = (self.high_slope + root - mean) / (self.high_slope - self.low_slope + 2 * root)
        return self.high_step - width * share

    def update(self, rows: Tensor, other: "Search") -> None:
        """Overwrite the searches `rows` [m], bool, by those of `other`."""
        for field in fields(self):
            mine, new = getattr(self, field.name), getattr(other, field.name)
            where = rows.view(-1, *[1] * (mine.ndim - 1))
            setattr(self, field.name, torch.where(where, new, mine))

    def select(self, rows: Tensor) -> None:
        """Keep only the searches `rows`, an index [k]."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


def _clamp(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(value, low), high)
