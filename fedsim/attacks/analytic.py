"""Analytic inversion: images read off the gradient of a first fully connected layer, without any optimisation."""

import time
from typing import Literal

import torch
from torch import Tensor, nn

from fedsim.attacks.base import Attack, ClosedFormSettings
from fedsim.attacks.labels import last_linear, recover_labels
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation, Reconstruction

SAME = 1e-3
"""Root-mean-square difference, in pixel units, below which two candidates count as the same image."""

FAINTEST = 1e-6
"""Share of the largest bias gradient below which a neuron's quotient is rounding error."""


class AnalyticConfig(ClosedFormSettings):
    """Division of a first linear layer's weight gradient by its bias gradient (Phong et al., 2018)."""

    name: Literal["analytic"] = "analytic"

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: the model starts with a linear layer, and ends with one.

        Batches need the layer's bias.
        """
        name, layer = first_layer(model)
        last_linear(model)
        if batch_size > 1 and layer.bias is None:
            raise ConfigError(f"analytic: {name} has no bias, without which only single images can be inverted")

    def build(self) -> Attack:
        """Return the attack."""
        return Analytic()


class Analytic(Attack):
    """Inverts a first layer y = Wx + b in closed form.

    With δ = ∂L/∂y the weight gradient is Σ δ_b x_bᵀ over the batch and the bias gradient Σ δ_b. Each neuron's
    quotient is a weighted mean of the images; a neuron that only one image activates (ReLU) gives that image
    exactly. Such neurons agree with each other, mixtures do not: images are taken by how many neurons agree.
    One image alone is always exact. Without a bias it is found up to its brightness, which is taken to reach 1.

    The loss is the share of the weight gradient's square that no combination of the images found explains.

    Source: Phong et al., "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", IEEE TIFS 2018;
    batches: Boenisch et al., "When the Curious Abandon Honesty", EuroS&P 2023, section 4 (honest weights).
    """

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        weight, _ = _gradients(observation)
        return _unexplained(weight, images.to(weight).flatten(2))

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """See `Attack`."""
        began = time.perf_counter()
        weight, bias = _gradients(observation)
        size = observation.batch_size
        if bias is None:
            images = torch.stack([_brightest_one(rows) for rows in weight])
        else:
            images = torch.stack([_most_agreed(w, b, size) for w, b in zip(weight, bias, strict=True)])
        count = torch.zeros(observation.victims, dtype=torch.long, device=weight.device)
        return Reconstruction(
            images=images.view(-1, size, *observation.model.shape),
            labels=recover_labels(observation),
            loss=_unexplained(weight, images),
            iterations=count,
            stalled=count.bool(),
            exhausted=count.bool(),
            seconds=time.perf_counter() - began,
        )


def first_layer(model: Model) -> tuple[str, nn.Linear]:
    """Return the linear layer that sees the flattened image itself.

    Raises:
        ConfigError: If the model starts with another layer.
    """
    leaves = ((n, m) for n, m in model.module.named_modules() if next(m.children(), None) is None)
    name, module = next((n, m) for n, m in leaves if not isinstance(m, nn.Flatten | nn.Identity))
    pixels = model.shape[0] * model.shape[1] * model.shape[2]
    if not isinstance(module, nn.Linear) or module.in_features != pixels:
        raise ConfigError(
            f"analytic needs a model that starts with a fully connected layer; this one starts with {name} "
            f"({type(module).__name__}): use model.name: mlp, or another attack"
        )
    return name, module


def _gradients(observation: Observation) -> tuple[Tensor, Tensor | None]:
    """Return the first layer's weight gradients [N, neurons, pixels] and bias gradients [N, neurons]."""
    name, _ = first_layer(observation.model)
    views = observation.model.layout.views(observation.gradients)
    return views[f"{name}.weight"], views.get(f"{name}.bias")


def _most_agreed(weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Return the `size` images [size, pixels] on which most neurons agree."""
    usable = bias.abs() > FAINTEST * bias.abs().max()
    if not usable.any():
        return weight.new_full((size, weight.shape[1]), 0.5)
    candidates = weight[usable] / bias[usable, None]
    agreed = (torch.cdist(candidates, candidates) < SAME * candidates.shape[1] ** 0.5).sum(1)
    outside = (candidates - candidates.clamp(0, 1)).square().mean(1)
    # Among mixtures, which agree with nobody, those that could be images come first.
    rank = agreed.double() - outside.double() / (1 + outside.double())
    chosen: list[Tensor] = []
    while len(chosen) < size:
        best = candidates[rank.argmax()]
        chosen.append(best)
        rank[(candidates - best).norm(dim=1) < SAME * candidates.shape[1] ** 0.5] = -torch.inf
        if torch.isinf(rank).all():
            chosen += [best] * (size - len(chosen))
    return torch.stack(chosen)


def _brightest_one(weight: Tensor) -> Tensor:
    """Return the one image [1, pixels] that all rows of δxᵀ share, its brightest pixel 1."""
    direction = torch.linalg.svd(weight, full_matrices=False).Vh[0]
    direction = direction * direction.sum().sign()
    image: Tensor = direction / direction.max().clamp(min=1e-12)
    return image[None]


def _unexplained(weight: Tensor, images: Tensor) -> Tensor:
    """Return the share [N] of ‖weight‖² outside the span of images [N, B, pixels]."""
    basis = torch.linalg.svd(images.mT.double(), full_matrices=False)
    used = basis.S > 1e-9 * basis.S[:, :1]
    inside = (weight.double() @ basis.U * used[:, None]).square().sum((1, 2))
    whole = weight.double().square().sum((1, 2)).clamp(min=1e-300)
    outside: Tensor = (1 - inside / whole).clamp(min=0)
    return outside.float()
