import pytest
import torch
from torch.nn import functional as F

from fedsim.attacks.distances import AbsoluteError, LayerCosine
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.gradient_matching import Targets
from fedsim.privacy.metrics import score
from tests.attacks.problems import lenet, observe, rand, victims

SIZES = (5, 3, 4)


def layer_cosine(g, t):
    pairs = zip(g.split(SIZES), t.split(SIZES), strict=True)
    return torch.stack([1 - F.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()


CASES = [(LayerCosine, layer_cosine), (AbsoluteError, lambda g, t: (g - t).abs().sum() / t.abs().sum())]


@pytest.mark.parametrize(("distance", "definition"), CASES)
def test_distances_and_their_derivatives_are_as_defined(distance, definition):
    targets = rand(2, 12, seed=1, dtype=torch.float64) - 0.5
    gradients = rand(3, 12, seed=2, dtype=torch.float64) - 0.5
    of = torch.tensor([1, 0, 1])
    losses, slopes = distance(Targets(targets, SIZES))(gradients.clone(), of)
    for row, victim in enumerate(of):
        mine = gradients[row].clone().requires_grad_()
        value = definition(mine, targets[victim])
        torch.testing.assert_close(losses[row], value.detach())
        torch.testing.assert_close(slopes[row], torch.autograd.grad(value, mine)[0])


@pytest.mark.parametrize("distance", [LayerCosine, AbsoluteError])
def test_a_gradient_of_zero_gives_finite_numbers(distance):
    losses, slopes = distance(Targets(torch.zeros(1, 12), SIZES))(torch.zeros(1, 12), torch.tensor([0]))
    assert torch.isfinite(losses).all() and torch.isfinite(slopes).all()


@pytest.mark.parametrize("objective", ["layer_cosine", "l1"])
def test_gia_finds_images_by_it(objective):
    images, labels = victims(2, shape=(1, 12, 12))
    observation = observe(lenet("uniform", (1, 12, 12)), images, labels, know_labels=True)
    attack = GIAConfig(iterations=400, objective=objective).build()
    found = attack.reconstruct(observation)
    assert min(row.PSNR for row in score(images, found.images)) > 18
    at_found = attack.matching_loss(observation, found.images, labels)
    torch.testing.assert_close(found.loss, at_found, rtol=1e-2, atol=0)
    plain = GIAConfig().build().matching_loss(observation, found.images, labels)
    assert ((at_found / plain).log().abs() > 0.1).all()
