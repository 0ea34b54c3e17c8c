"""The loss that the audit asks for at the private images."""

import pytest
import torch
from torch import Tensor
from torch.func import grad
from torch.nn import functional as F

from fedsim.attacks.base import AttackSettings
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.idlg import IDLGConfig
from fedsim.learning.models import LeNetConfig, build_model
from fedsim.privacy.observation import Observation


def observed(noise: float) -> tuple[Observation, Tensor, Tensor]:
    """Two victims with a batch of two images each, their gradients with noise."""
    model = build_model(LeNetConfig(init="uniform"), (1, 28, 28), 10, seed=0)
    weights, generator = model.initial_weights(), torch.Generator().manual_seed(0)
    images = torch.rand(2, 2, 1, 28, 28, generator=generator)
    labels = torch.tensor([[1, 2], [3, 3]])
    gradients = torch.stack(
        [
            grad(lambda w, x, y: F.cross_entropy(model.logits(w, x), y))(weights, x, y)
            for x, y in zip(images, labels, strict=True)
        ]
    )
    gradients += noise * torch.randn(gradients.shape, generator=generator)
    return Observation(model, weights, gradients, 2, torch.zeros(2, 0), labels, (1, 2)), images, labels


@pytest.mark.parametrize("settings", [DLGConfig(), DLGConfig(published=True), IDLGConfig(), GIAConfig(tv=0)])
def test_the_truth_matches_an_undefended_gradient(settings: AttackSettings) -> None:
    observation, images, labels = observed(noise=0)
    loss = settings.build().matching_loss(observation, images, labels)
    assert loss is not None
    assert loss.shape == (2,)
    assert loss.abs().max() < 1e-6


def test_under_noise_the_loss_of_the_truth_is_that_of_the_noise() -> None:
    clean, _, _ = observed(noise=0)
    observation, images, labels = observed(noise=0.01)
    loss = DLGConfig().build().matching_loss(observation, images, labels)
    expected = (observation.gradients - clean.gradients).square().sum(1) / observation.gradients.square().sum(1)
    assert torch.allclose(loss, expected, rtol=1e-4)


def test_total_variation_counts_in_the_loss_of_gia() -> None:
    observation, images, labels = observed(noise=0)
    other = 1 - images  # whose gradient is not the one observed
    variation = other.diff(dim=-1).abs().mean((1, 2, 3, 4)) + other.diff(dim=-2).abs().mean((1, 2, 3, 4))

    def loss(**settings: object) -> torch.Tensor:
        return GIAConfig(**settings).build().matching_loss(observation, other, labels)

    assert torch.allclose(loss(tv=0.5, relative_tv=False) - loss(tv=0), 0.5 * variation, rtol=0.01)
    assert torch.allclose(loss(tv=0.5) / loss(tv=0), (0.5 * variation).exp(), rtol=0.01)


def test_muted_parameters_do_not_count() -> None:
    observation, images, labels = observed(noise=0)
    span = observation.model.layout.span("fc.weight")
    observation.gradients[:, span] = 7.0
    settings = DLGConfig(ignore=("fc.weight",))
    assert settings.build().matching_loss(observation, images, labels).max() < 1e-6
    assert DLGConfig().build().matching_loss(observation, images, labels).min() > 0.1
