"""Small observations and slow references shared by the tests of attacks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.learning.models import LeNetConfig, Model, build_model
from fedsim.privacy.observation import Observation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def smooth_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Images with the structure that priors expect: coarse random fields, in [0, 1]."""
    channels, height, width = shape
    coarse = rand(count, channels, 4, 4, seed=seed)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def gradient_of(model: Model, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of one batch, by plain automatic differentiation."""
    weights = weights.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.logits(weights, images), labels), weights)
    return gradient


def observe(
    model: Model, images: Tensor, labels: Tensor, *, know_labels: bool = False, first_seed: int = 1
) -> Observation:
    """What a server sees of victims whose batches are images [N, B, C, H, W]; none is defended."""
    weights = model.initial_weights()
    gradients = [gradient_of(model, weights, x, y) for x, y in zip(images, labels, strict=True)]
    return Observation(
        model=model,
        weights=weights,
        gradients=torch.stack(gradients),
        batch_size=images.shape[1],
        statistics=weights.new_zeros(len(images), 0),
        labels=labels if know_labels else None,
        seeds=tuple(range(first_seed, first_seed + len(images))),
    )


def squared(g: Tensor, t: Tensor, sizes: Sequence[int]) -> Tensor:
    return (g - t).square().sum() / t.square().sum()


def cosine(g: Tensor, t: Tensor, sizes: Sequence[int]) -> Tensor:
    return 1 - F.cosine_similarity(g, t, dim=0)


def balanced(g: Tensor, t: Tensor, sizes: Sequence[int]) -> Tensor:
    parts = list(zip(g.split(sizes), t.split(sizes), strict=True))
    errors = torch.stack([(a - b).square().sum() / b.norm() for a, b in parts])
    return errors.sum() / torch.stack([b.norm() for _, b in parts]).sum()


def lenet(init: str = "default", shape: tuple[int, int, int] = (1, 16, 16), classes: int = 10) -> Model:
    return build_model(LeNetConfig(init=init), shape, classes, seed=0)


def victims(count: int, batch: int = 1, shape: tuple[int, int, int] = (1, 16, 16)) -> tuple[Tensor, Tensor]:
    images = smooth_images(count * batch, shape).view(count, batch, *shape)
    labels = torch.randint(0, 10, (count, batch), generator=generator(5))
    return images, labels


def double(model: Model) -> Model:
    model.module.double()
    return model


class Perceptron(nn.Module):
    """Not a chain of known layers: its forward pass is its own."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, 12)
        self.out = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x.flatten(1))))
