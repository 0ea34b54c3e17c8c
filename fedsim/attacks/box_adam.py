"""Adam on the dummy images of many problems at once, inside the box [0, 1]."""

import torch
from torch import Tensor

from fedsim.attacks.lbfgs import SIGNIFICANT
from fedsim.privacy.observation import Observation, Reconstruction
from fedsim.randomness import Purpose, torch_stream

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's, as in Kingma and Ba, 2015."""


class BoxAdam:
    """Moves the images of M = victims × restarts problems, victim by victim, and keeps the best of each.

    Attributes:
        images: Where the problems are, shape [M, B, C, H, W].
        victims: The victim that each belongs to, shape [M].
        generators: The random stream of each, length M.
        rates: The local learning rate that each assumes, shape [M]; None where it is known.
    """

    def __init__(self, observation: Observation, restarts: int, iterations: int) -> None:
        """Start at U[0, 1) images, each from its own stream, for a search of `iterations` steps."""
        everyone = torch.arange(observation.victims, device=observation.weights.device)
        self.victims = everyone.repeat_interleave(restarts)
        streams = [(seed, restart) for seed in observation.seeds for restart in range(restarts)]
        self.generators = [torch_stream(seed, Purpose.ATTACK, restart) for seed, restart in streams]
        shape = (observation.batch_size, *observation.model.shape)
        self.images = torch.stack([torch.rand(shape, generator=own) for own in self.generators])
        self.images = self.images.to(observation.weights)
        self.restarts, self.iterations = restarts, iterations
        self.rates: Tensor | None = None
        self.best_rates: Tensor | None = None
        self.mean, self.square = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self.best = self.images.clone()
        self.best_loss = self.images.new_full((len(self.images),), torch.inf)
        self.first_loss = self.mark = self.best_loss
        self.done = 0

    def note(self, loss: Tensor, scale: Tensor) -> None:
        """Keep the images whose loss [M] is the lowest so far; unknown rates go half the way to `scale` [M]."""
        better = loss < self.best_loss
        if self.rates is not None:
            kept = self.rates if self.best_rates is None else self.best_rates
            self.best_rates, self.rates = torch.where(better, self.rates, kept), (self.rates * scale).sqrt()
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best[better] = self.images[better]
        if self.done == 0:
            self.first_loss = loss
        if self.done == self.iterations * 9 // 10:
            self.mark = self.best_loss

    def move(self, gradient: Tensor, rate: float) -> None:
        """Take a step of size `rate`, in pixel units, against `gradient` [M, B, C, H, W]."""
        self.done += 1
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        scale = (self.square / (1 - BETAS[1] ** self.done)).sqrt_().add_(EPSILON)
        self.images.addcdiv_(self.mean, scale, value=-rate / (1 - BETAS[0] ** self.done)).clamp_(0, 1)

    def shake(self, spread: float) -> None:
        """Add N(0, spread²) to every pixel, from each problem's own stream; what leaves the box is clamped."""
        if spread:
            draws = [torch.randn(self.images.shape[1:], generator=own) for own in self.generators]
            self.images.add_(torch.stack(draws).to(self.images), alpha=spread).clamp_(0, 1)

    def reconstruction(self, labels: Tensor, seconds: float) -> Reconstruction:
        """Return the best of each victim's restarts, by loss; `labels` [N, B] are those that were assumed."""
        loss, chosen = self.best_loss.view(len(labels), -1).min(1)
        chosen = chosen + self.restarts * torch.arange(len(labels), device=chosen.device)
        stalled = ~(loss < (1 - SIGNIFICANT) * self.first_loss[chosen])
        return Reconstruction(
            images=self.best[chosen],
            labels=labels,
            loss=loss,
            iterations=torch.full_like(chosen, self.iterations),
            stalled=stalled,
            exhausted=~stalled & (loss < (1 - SIGNIFICANT) * self.mark[chosen]),
            seconds=seconds,
            learning_rates=None if self.best_rates is None else self.best_rates[chosen],
        )
