"""The network of the learned inverter, and its training."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.attacks.gradient_features import GradientFeatures
from fedsim.attacks.schedules import warm_cosine

WEIGHT_DECAY = 1e-2
"""Of AdamW."""
WARM_UP = 50
"""Steps over which the step size grows, or a tenth of all if that is less."""
LABEL_WEIGHT = 0.01
"""Weight of the labels' cross-entropy beside the images' squared error."""
LOOKS = 20
"""Times that training looks at the held-out images."""
PATIENCE = 6
"""Looks without any gain after which it stops."""
SIGNIFICANT = 0.01
"""The error still falls if the last tenth of the steps lowered it by at least this share."""


class InverterNetwork(nn.Module):
    """Maps gradients to B images each and their labels: a gate by block, then a linear map beside a perceptron."""

    def __init__(
        self, features: GradientFeatures, mean: Tensor, batch_size: int, classes: int, width: int, seed: int
    ) -> None:
        """Start at the mean image [C, H, W] of the public images; `seed` draws the initial weights."""
        super().__init__()
        self.shape, self.batch_size, self.classes = tuple(mean.shape), batch_size, classes
        components, blocks, pixels = sum(features.widths), len(features.widths), batch_size * mean.numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gate = nn.Linear(blocks, blocks)
            self.linear = nn.Linear(components, pixels)
            self.read = nn.Linear(components, width)
            self.hidden = nn.Linear(width, width)
            self.images = nn.Linear(width, pixels)
            self.labels = nn.Linear(width, batch_size * classes)
        with torch.no_grad():
            # A block with much more left over than usual is noisy: it starts closed, the others open.
            self.gate.weight.copy_(-6 * torch.eye(blocks))
            self.gate.bias.fill_(3)
            self.linear.weight.zero_()
            self.linear.bias.copy_(mean.flatten().repeat(batch_size))
        self.register_buffer("widths", torch.tensor(features.widths))
        self.features = features
        self.to(features.get_buffer("mean").device)

    def decode(self, components: Tensor, leftovers: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [m, r] and [m, n] to images [m, B, C, H, W] and logits [m, B, classes]."""
        gates = torch.sigmoid(self.gate(leftovers)).repeat_interleave(self.get_buffer("widths"), 1)
        x = components * gates
        hidden = F.gelu(self.hidden(F.gelu(self.read(x))))
        images = self.linear(x) + self.images(hidden)
        logits = self.labels(hidden)
        return images.view(-1, self.batch_size, *self.shape), logits.view(-1, self.batch_size, self.classes)

    @torch.no_grad()
    def forward(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Map gradients [m, d], one by one: in a batch the last bits would depend on who else is in it."""
        images, logits = zip(*(self.decode(*self.features(one)) for one in gradients.split(1)), strict=True)
        return torch.cat(images), torch.cat(logits)


@dataclass(frozen=True)
class Examples:
    """Gradients whose images are known.

    Attributes:
        components: Standardised components, shape [n, r].
        leftovers: Standardised leftovers, shape [n, k].
        batches: Indices of the images behind each, shape [n, B].
        look_up: Maps batches [m, B] to images [m, B, C, H, W] and labels [m, B].
    """

    components: Tensor
    leftovers: Tensor
    batches: Tensor
    look_up: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.batches)

    def errors(self, network: InverterNetwork, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of the images, and the cross-entropy of the labels, of `rows` [m]."""
        images, labels = self.look_up(self.batches[rows])
        found, logits = network.decode(self.components[rows], self.leftovers[rows])
        order = matched(found.detach(), images)
        images = images.take_along_dim(order[:, :, None, None, None], 1)
        labels = labels.take_along_dim(order, 1)
        return F.mse_loss(found, images), F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def matched(found: Tensor, images: Tensor) -> Tensor:
    """Return for each found image of a batch the private one it stands for, so that errors are least, [m, B].

    Source: Kuhn, "The Hungarian method for the assignment problem", 1955; as a loss for gradient inversion: Wu
    et al., "Learning to Invert", UAI 2023.
    """
    m, size = images.shape[:2]
    if size == 1:
        return torch.zeros(m, 1, dtype=torch.long, device=images.device)
    from scipy.optimize import linear_sum_assignment  # every worker would pay for importing it

    costs = torch.cdist(found.flatten(2), images.flatten(2)).square().cpu().numpy()
    orders = [torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in costs]
    return torch.stack(orders).to(images.device)


@dataclass(frozen=True)
class Trained:
    """The outcome of a training.

    Attributes:
        network: As it was when its held-out error was least.
        error: That error, mean squared, pixel units.
        steps: Steps that were taken.
        exhausted: The steps ran out while the error still fell.
    """

    network: InverterNetwork
    error: float
    steps: int
    exhausted: bool


def train(
    network: InverterNetwork,
    examples: Examples,
    held_out: Examples,
    steps: int,
    batch: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Trained:
    """Train on `examples` by AdamW with a cosine schedule; stop early by the error on images held out.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; "SGDR", ICLR 2017.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    warm, between = max(1, min(WARM_UP, steps // 10)), max(1, steps // LOOKS)
    best, least, mark, since, step = copy.deepcopy(network.state_dict()), math.inf, math.inf, 0, 0
    device = generator.device
    while step < steps and since < PATIENCE:
        optimizer.param_groups[0]["lr"] = warm_cosine(learning_rate, step, steps, warm)
        rows = torch.randint(len(examples), (batch,), generator=generator, device=device)
        error, confusion = examples.errors(network, rows)
        optimizer.zero_grad()
        (error + LABEL_WEIGHT * confusion).backward()
        optimizer.step()
        step += 1
        if step % between == 0 or step == steps:
            with torch.no_grad():
                error_now = float(held_out.errors(network, torch.arange(len(held_out), device=device))[0])
            if step <= steps * 9 // 10:
                mark = min(mark, error_now)
            since = 0 if error_now < least else since + 1
            if since == 0:
                best, least = copy.deepcopy(network.state_dict()), error_now
    network.load_state_dict(best)
    return Trained(network.eval(), least, step, step == steps and least < (1 - SIGNIFICANT) * mark)
