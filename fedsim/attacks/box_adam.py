"""Adam on many problems at once: on their dummy images inside the box [0, 1], or on what stands for them."""

import torch
from torch import Tensor

from fedsim.attacks.lbfgs import SIGNIFICANT
from fedsim.privacy.observation import Observation, Reconstruction
from fedsim.randomness import Purpose, torch_stream

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's, as in Kingma and Ba, 2015."""


class ProblemAdam:
    """Moves what stands for the images of M = victims × restarts problems, and keeps the best of each.

    Attributes:
        points: Where the problems are, victim by victim, shape [M, ...].
        victims: The victim that each belongs to, shape [M].
        generators: The random stream of each, length M.
        rates: The local learning rate that each assumes, shape [M]; None where it is known.
    """

    points: Tensor

    def __init__(self, observation: Observation, restarts: int, iterations: int) -> None:
        """Prepare a search of `iterations` steps; `begin` starts it."""
        everyone = torch.arange(observation.victims, device=observation.weights.device)
        self.victims = everyone.repeat_interleave(restarts)
        streams = [(seed, restart) for seed in observation.seeds for restart in range(restarts)]
        self.generators = [torch_stream(seed, Purpose.ATTACK, restart) for seed, restart in streams]
        self.restarts, self.iterations = restarts, iterations
        self.rates: Tensor | None = None
        self.best_rates: Tensor | None = None
        self.done = 0

    def begin(self, points: Tensor) -> None:
        """Start at `points` [M, ...]."""
        self.points = points
        self.mean, self.square = torch.zeros_like(points), torch.zeros_like(points)
        self.best = points.clone()
        self.best_loss = points.new_full((len(points),), torch.inf)
        self.first_loss = self.mark = self.best_loss

    def note(self, loss: Tensor, scale: Tensor) -> None:
        """Keep the points whose loss [M] is the lowest so far; unknown rates go half the way to `scale` [M]."""
        better = loss < self.best_loss
        if self.rates is not None:
            kept = self.rates if self.best_rates is None else self.best_rates
            self.best_rates, self.rates = torch.where(better, self.rates, kept), (self.rates * scale).sqrt()
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best = torch.where(better.view(-1, *[1] * (self.points.ndim - 1)), self.points, self.best)
        if self.done == 0:
            self.first_loss = loss
        if self.done == self.iterations * 9 // 10:
            self.mark = self.best_loss

    def move(self, gradient: Tensor, rate: float) -> None:
        """Take a step of size `rate`, in units of the points, against `gradient` [M, ...]."""
        self.done += 1
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        scale = (self.square / (1 - BETAS[1] ** self.done)).sqrt_().add_(EPSILON)
        self.points.addcdiv_(self.mean, scale, value=-rate / (1 - BETAS[0] ** self.done))

    def chosen(self) -> Tensor:
        """Return the problem with the lowest loss of each victim, [N]."""
        losses = self.best_loss.view(-1, self.restarts)
        return losses.argmin(1) + self.restarts * torch.arange(len(losses), device=losses.device)

    def reconstruction(self, labels: Tensor, seconds: float, images: Tensor | None = None) -> Reconstruction:
        """Return the best of each victim's restarts, by loss.

        Args:
            labels: Those that were assumed, shape [N, B].
            seconds: Time that the search took.
            images: What the best points stand for, shape [N, B, C, H, W]; None: the points are images.
        """
        chosen = self.chosen()
        loss = self.best_loss[chosen]
        stalled = ~(loss < (1 - SIGNIFICANT) * self.first_loss[chosen])
        return Reconstruction(
            images=self.best[chosen] if images is None else images,
            labels=labels,
            loss=loss,
            iterations=torch.full_like(chosen, self.iterations),
            stalled=stalled,
            exhausted=~stalled & (loss < (1 - SIGNIFICANT) * self.mark[chosen]),
            seconds=seconds,
            learning_rates=None if self.best_rates is None else self.best_rates[chosen],
        )


class BoxAdam(ProblemAdam):
    """Moves the dummy images themselves, shape [M, B, C, H, W], inside the box [0, 1]."""

    def __init__(
        self, observation: Observation, restarts: int, iterations: int, start: Tensor | None = None
    ) -> None:
        """Start at `start`, or by default at U[0, 1) images, each from its own stream."""
        super().__init__(observation, restarts, iterations)
        if start is None:
            shape = (observation.batch_size, *observation.model.shape)
            start = torch.stack([torch.rand(shape, generator=own) for own in self.generators])
        self.begin(start.to(observation.weights).clone())

    @property
    def images(self) -> Tensor:
        """Where the problems are."""
        return self.points

    def move(self, gradient: Tensor, rate: float) -> None:
        """Take a step, in pixel units; see `ProblemAdam.move`."""
        super().move(gradient, rate)
        self.points.clamp_(0, 1)

    def shake(self, spread: float) -> None:
        """Add N(0, spread²) to every pixel, from each problem's own stream; what leaves the box is clamped."""
        if spread:
            draws = [torch.randn(self.points.shape[1:], generator=own) for own in self.generators]
            self.points.add_(torch.stack(draws).to(self.points), alpha=spread).clamp_(0, 1)
