"""The generator of the generative attack: what images look like, learned from public ones."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.attacks.residuals import Residuals
from fedsim.attacks.schedules import warm_cosine

WEIGHT_DECAY = 1e-2
"""Of AdamW."""
WARM_UP = 50
"""Steps over which the step size grows, or a tenth of all if that is less."""
LOOKS = 10
"""Times that training looks at the held-out images."""
PROJECTED = 200
"""Held-out images, at most, whose nearest image is searched to measure the ceiling."""
PROJECTION_STEPS, PROJECTION_RATE = 100, 0.05
"""Adam steps of that search, and their size."""
LOG_VARIANCES = (-12.0, 4.0)
"""Bounds of what the encoder says of its doubt."""
MEAN_WITHIN = (0.01, 0.99)
"""Where pixels of the first image are clamped to, for finite logits."""
LEAST_ERROR = 1e-6
"""Mean squared error at which a batch counts as drawn perfectly: its logarithm stays finite."""


class Generator(nn.Module):
    """Draws images from latents and, where it is conditional, classes: a linear map beside a perceptron."""

    def __init__(self, shape: tuple[int, ...], latents: int, width: int, classes: int) -> None:
        """Prepare for images of `shape` (C, H, W); `classes` is 0 where it takes none."""
        super().__init__()
        self.shape, self.latents, self.classes = tuple(shape), latents, classes
        inputs, pixels = latents + classes, math.prod(shape)
        self.linear = nn.Linear(inputs, pixels)
        self.read = nn.Linear(inputs, width)
        self.hidden = nn.Linear(width, width)
        self.write = nn.Linear(width, pixels)

    @torch.no_grad()
    def begin_at(self, image: Tensor) -> None:
        """Let the linear map start at an image [C, H, W]."""
        self.linear.bias.copy_(image.flatten().clamp(*MEAN_WITHIN).logit())

    def forward(self, latents: Tensor, probabilities: Tensor) -> Tensor:
        """Draw images.

        Args:
            latents: Shape [..., latents]; N(0, 1) each for images like those learned from.
            probabilities: Classes, one-hot, shape [..., classes]; not looked at where it takes none.

        Returns:
            Images in (0, 1), shape [..., C, H, W].
        """
        inputs = torch.cat([latents, probabilities], -1) if self.classes else latents
        hidden = F.gelu(self.hidden(F.gelu(self.read(inputs))))
        pixels = torch.sigmoid(self.linear(inputs) + self.write(hidden))
        return pixels.view(*pixels.shape[:-1], *self.shape)


class Encoder(nn.Module):
    """Reads latents off images: mean and logarithm of the variance of each. Only training needs it."""

    def __init__(self, generator: Generator, width: int) -> None:
        """Prepare to encode for `generator`."""
        super().__init__()
        self.classes = generator.classes
        self.read = nn.Linear(math.prod(generator.shape) + self.classes, width)
        self.hidden = nn.Linear(width, width)
        self.write = nn.Linear(width, 2 * generator.latents)

    def forward(self, images: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [m, C, H, W] and one-hot classes [m, classes] to means and log-variances [m, latents]."""
        flat = images.flatten(1)
        inputs = torch.cat([flat, probabilities], 1) if self.classes else flat
        means, logs = self.write(F.gelu(self.hidden(F.gelu(self.read(inputs))))).chunk(2, 1)
        return means, logs.clamp(*LOG_VARIANCES)


@dataclass(frozen=True)
class Trained:
    """The outcome of a training.

    Attributes:
        generator: As it was when the bound on held-out images was best.
        ceiling: Mean PSNR, in dB, of the generator's images nearest to held-out ones: no search does better on
            average, unless it leaves the generator.
        read: Mean PSNR, in dB, of held-out images that went through the encoder and the generator.
        images: Images learned from.
        held_out: Images held out.
        residuals: What held-out images have that the generator's nearest lack.
    """

    generator: Generator
    ceiling: float
    read: float
    images: int
    held_out: int
    residuals: Residuals


@dataclass(frozen=True)
class Examples:
    """Images [n, C, H, W] in [0, 1], and their classes, one-hot, [n, classes]."""

    images: Tensor
    probabilities: Tensor

    def select(self, rows: Tensor | slice) -> "Examples":
        """Return some of them."""
        return Examples(self.images[rows], self.probabilities[rows])


def train(
    examples: Examples,
    held_out: Examples,
    latents: int,
    width: int,
    conditional: bool,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    stream: torch.Generator,
) -> Trained:
    """Train a variational autoencoder by AdamW with a cosine schedule; keep its generator.

    Args:
        examples: What to learn from.
        held_out: What chooses the weights and tells the ceiling.
        latents: Number of latents.
        width: Width of the hidden layers.
        conditional: Whether the generator takes the class.
        steps: Steps.
        batch: Images a step.
        learning_rate: Largest step size.
        seed: Draws the initial weights.
        stream: Draws everything else.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, equation 10; the variance of the
    pixels is the one that fits best: Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with
    Calibrated Decoders", ICML 2021, equation 5.
    """
    classes = examples.probabilities.shape[1] if conditional else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(tuple(examples.images.shape[1:]), latents, width, classes)
        encoder = Encoder(generator, width)
    generator.begin_at(examples.images.mean(0).cpu())
    both = nn.ModuleList([generator, encoder]).to(examples.images.device)
    optimizer = torch.optim.AdamW(both.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    warm, between = max(1, min(WARM_UP, steps // 10)), max(1, steps // LOOKS)
    best, least = copy.deepcopy(both.state_dict()), math.inf
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = warm_cosine(learning_rate, step, steps, warm)
        rows = torch.randint(len(examples.images), (batch,), generator=stream, device=stream.device)
        optimizer.zero_grad()
        negative_bound(generator, encoder, examples.select(rows), stream).backward()
        optimizer.step()
        if (step + 1) % between == 0 or step + 1 == steps:
            with torch.no_grad():
                now = float(negative_bound(generator, encoder, held_out, None))
            if now < least:
                best, least = copy.deepcopy(both.state_dict()), now
    both.load_state_dict(best)
    both.eval().requires_grad_(False)
    read, ceiling, residuals = reach(generator, encoder, held_out.select(slice(PROJECTED)))
    return Trained(generator, ceiling, read, len(examples.images), len(held_out.images), residuals)


def negative_bound(
    generator: Generator, encoder: Encoder, examples: Examples, stream: torch.Generator | None
) -> Tensor:
    """Return the negative evidence bound an image, in nats, up to a constant; without a stream at the means."""
    means, logs = encoder(examples.images, examples.probabilities)
    latents = means
    if stream is not None:
        noise = torch.randn(means.shape, generator=stream, device=means.device)
        latents = means + noise * (logs / 2).exp()
    error = F.mse_loss(generator(latents, examples.probabilities), examples.images).clamp_min(LEAST_ERROR)
    divergence = 0.5 * (means.square() + logs.exp() - 1 - logs).sum(1).mean()
    bound: Tensor = examples.images[0].numel() / 2 * error.log() + divergence
    return bound


def reach(generator: Generator, encoder: Encoder, examples: Examples) -> tuple[float, float, Residuals]:
    """Return the mean PSNR, in dB, of images as the encoder reads them and of the nearest that Adam finds.

    Third comes what the nearest lack.
    """
    with torch.enable_grad():
        latents = encoder(examples.images, examples.probabilities)[0].detach().requires_grad_()
        optimizer = torch.optim.Adam([latents], lr=PROJECTION_RATE)
        errors, nearest = [], torch.zeros_like(examples.images)
        for step in range(PROJECTION_STEPS + 1):
            drawn = generator(latents, examples.probabilities)
            error = (drawn - examples.images).square().flatten(1).mean(1)
            errors.append(error.detach())
            closest = error.detach() <= torch.stack(errors).amin(0)
            nearest[closest] = drawn.detach()[closest]
            if step < PROJECTION_STEPS:
                optimizer.zero_grad()
                error.sum().backward()
                optimizer.step()
    least = torch.stack(errors).amin(0)
    read, ceiling = (float(-10 * e.clamp_min(1e-12).log10().mean()) for e in (errors[0], least))
    return read, ceiling, Residuals.of(examples.images - nearest)
