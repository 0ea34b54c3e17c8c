import math

import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch.nn import functional as F

from fedsim.defenses.dp import GaussianConfig, LaplacianConfig, laplace_
from tests.defenses.defense_cases import client_context, draw, lenet, tiny_model

MODEL = tiny_model()
BOTH = pytest.mark.parametrize("config", [GaussianConfig, LaplacianConfig])


@BOTH
def test_noise_has_the_asked_standard_deviation_and_law(config):
    model = lenet()
    updates = torch.ones(4, model.layout.dimension)
    noise = config(sigma=0.3).build().protect(updates, client_context(model, size=1)) - 1
    law = stats.norm if config is GaussianConfig else stats.laplace
    scale = 0.3 if config is GaussianConfig else 0.3 / math.sqrt(2)
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert stats.kstest(noise.flatten().numpy(), law(scale=scale).cdf).pvalue > 0.01


@BOTH
def test_noise_is_the_clients_own_whatever_its_chunk(config):
    updates = draw(4, MODEL.layout.dimension)
    defense = config(sigma=0.3).build()
    together = defense.protect(updates, client_context(MODEL, [3, 7, 1, 9]))
    alone = defense.protect(updates[1:2], client_context(MODEL, [7]))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0] - updates[0], together[1] - updates[1])


@BOTH
def test_sigma_zero_without_clipping_is_the_identity(config):
    updates = draw(4, MODEL.layout.dimension)
    assert torch.equal(config(sigma=0).build().protect(updates, client_context(MODEL)), updates)


def test_laplace_is_the_inverse_distribution_function():
    uniform = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    expected = torch.from_numpy(stats.laplace.ppf(uniform.numpy()))
    assert torch.allclose(laplace_(uniform.clone()), expected, atol=1e-12)


def test_laplace_in_float32_is_right_to_the_last_digit():
    uniform = torch.cat(
        [
            torch.rand(10_000, generator=torch.Generator().manual_seed(0)),
            0.5 + torch.arange(-50, 50) * torch.finfo(torch.float32).eps / 2,
        ]
    )
    centred = uniform.double() - 0.5 + torch.finfo(torch.float32).eps / 4
    expected = torch.from_numpy(stats.laplace.ppf(0.5 + centred.numpy()))
    assert torch.allclose(laplace_(uniform).double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laplace_is_finite_and_symmetric_at_the_ends_of_the_uniform_range(dtype):
    ends = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    low, high = laplace_(ends).tolist()
    assert math.isfinite(low) and low == -high < -10


def test_clients_are_clipped_to_the_norm():
    updates = draw(4, MODEL.layout.dimension) * torch.tensor([[1e-3], [1.0], [10.0], [100.0]])
    result = GaussianConfig(sigma=0, clipping_norm=0.5).build().protect(updates, client_context(MODEL))
    assert torch.allclose(result.norm(dim=1), updates.norm(dim=1).clamp(max=0.5))
    assert torch.allclose(F.cosine_similarity(result, updates), torch.ones(4, dtype=torch.float64))


def test_samples_are_clipped_before_they_are_averaged():
    context = client_context(MODEL, size=5)
    config = GaussianConfig(sigma=0, clipping_norm=0.4, clip="sample")
    result = config.build().protect(torch.zeros(4, MODEL.layout.dimension).double(), context)
    batch = context.batches[0]
    for row, images, labels in zip(result, batch.images, batch.labels, strict=True):
        mean = torch.zeros_like(row)
        for image, label in zip(images, labels, strict=True):
            weights = context.weights.clone().requires_grad_()
            loss = F.cross_entropy(MODEL.logits(weights, image[None]), label[None])
            (gradient,) = torch.autograd.grad(loss, weights)
            mean += gradient / max(1.0, gradient.norm().item() / 0.4) / len(labels)
        assert torch.allclose(row, mean, atol=1e-12)


def test_clipping_samples_needs_a_norm_and_one_local_step():
    with pytest.raises(ValidationError, match="clipping_norm"):
        LaplacianConfig(clip="sample")
    assert GaussianConfig(clip="sample", clipping_norm=1).needs_one_local_step()
    assert not GaussianConfig(clipping_norm=1).needs_one_local_step()
