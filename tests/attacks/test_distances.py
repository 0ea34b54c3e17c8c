import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fedsim.attacks.distances import (
    AbsoluteError,
    BalancedError,
    CosineDistance,
    LayerCosine,
    SliceError,
    SquaredError,
    Targets,
)
from fedsim.attacks.gia import GIAConfig
from fedsim.privacy.metrics import score
from tests.attacks.problems import balanced, cosine, generator, lenet, observe, rand, squared, victims

SIZES = (5, 3, 4)
BOUNDS = (0, 2, 7, 7, 12)
REPEATS = rand(3, 2, 12, seed=3, dtype=torch.float64) - 0.5


def layer_cosine(g, t, victim):
    pairs = zip(g.split(SIZES), t.split(SIZES), strict=True)
    return torch.stack([1 - F.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()


def absolute(g, t, victim):
    return (g - t).abs().sum() / t.abs().sum()


def repeated(g, t, victim):
    every = torch.cat([t[None], REPEATS[victim]])
    return (g - every).abs().sum() / every.abs().sum()


def slices(g, t, victim):
    value = g.new_ones(())
    for start, stop in zip(BOUNDS, BOUNDS[1:], strict=False):
        if stop > start:
            residual = (g[start:stop] - t[start:stop]).square().sum()
            value = value * (residual / t[start:stop].square().sum()) ** ((stop - start) / len(t))
    return value


CASES = [
    (SquaredError, lambda g, t, victim: squared(g, t, SIZES)),
    (CosineDistance, lambda g, t, victim: cosine(g, t, SIZES)),
    (BalancedError, lambda g, t, victim: balanced(g, t, SIZES)),
    (LayerCosine, layer_cosine),
    (AbsoluteError, absolute),
    (partial(AbsoluteError, repeats=REPEATS), repeated),
    (partial(SliceError, bounds=BOUNDS), slices),
]
DISTANCES = [distance for distance, _ in CASES]


@pytest.mark.parametrize(("distance", "definition"), CASES)
def test_distances_and_their_derivatives_agree_with_the_definitions(distance, definition):
    targets = rand(3, 12, dtype=torch.float64) - 0.5
    gradients = rand(5, 12, seed=1, dtype=torch.float64) - 0.5
    of = torch.tensor([0, 2, 2, 1, 0])
    loss, derivative = distance(Targets(targets, SIZES))(gradients.clone(), of)
    for row, victim in enumerate(of):
        g = gradients[row].clone().requires_grad_()
        value = definition(g, targets[victim], victim)
        (slope,) = torch.autograd.grad(value, g)
        torch.testing.assert_close(loss[row], value.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(derivative[row], slope, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_gradient_of_zero_gives_finite_numbers(distance):
    losses, slopes = distance(Targets(torch.zeros(3, 12), SIZES))(torch.zeros(1, 12), torch.tensor([0]))
    assert torch.isfinite(losses).all() and torch.isfinite(slopes).all()


def test_ignored_parameters_have_no_part_in_slices_and_rounds():
    """A gradient of 12 entries of which 5 … 8 and the last are ignored is one of 8 entries without them."""
    spans, kept = (slice(0, 5), slice(8, 11)), [0, 1, 2, 3, 4, 8, 9, 10]
    targets, gradients = rand(2, 8, seed=1), rand(2, 8, seed=2)
    of, repeats = torch.arange(2), rand(2, 2, 12, seed=4)
    ignoring, plain = Targets(targets, (5, 3), spans), Targets(targets, (5, 3))
    pairs = [
        (SliceError(ignoring, (0, 2, 6, 9, 11, 12)), SliceError(plain, (0, 2, 5, 6, 8, 8))),
        (AbsoluteError(ignoring, repeats), AbsoluteError(plain, repeats[:, :, kept])),
    ]
    for mine, expected in pairs:
        for found, value in zip(mine(gradients.clone(), of), expected(gradients.clone(), of), strict=True):
            torch.testing.assert_close(found, value)


def test_the_unscaled_error_is_that_of_dlg():
    targets, gradients = rand(2, 6), rand(2, 6, seed=1)
    loss, _ = SquaredError(Targets(targets, (6,)), relative=False)(gradients, torch.arange(2))
    torch.testing.assert_close(loss, (gradients - targets).square().sum(1))


def test_a_small_angle_keeps_its_digits_in_float32():
    target = rand(1, 2000)
    sideways = rand(1, 2000, seed=1)
    sideways -= (sideways @ target.T) * target / target.square().sum()
    angle = 1e-5
    gradient = target + angle * sideways * target.norm() / sideways.norm()
    loss, _ = CosineDistance(Targets(target, (2000,)))(gradient, torch.zeros(1, dtype=torch.long))
    assert float(loss) == pytest.approx(angle**2 / 2, rel=1e-2)


def test_the_slice_error_is_one_at_zero_and_finite_at_an_exact_match():
    targets, victim = rand(1, 12), torch.zeros(1, dtype=torch.long)
    distance = SliceError(Targets(targets, (12,)), BOUNDS)
    at_zero, _ = distance(torch.zeros(1, 12), victim)
    torch.testing.assert_close(at_zero, torch.ones(1))
    loss, slope = distance(targets.clone(), victim)
    assert torch.isfinite(loss).all() and torch.isfinite(slope).all() and float(loss) < 1e-6


def test_a_slice_counts_as_it_is_or_clipped_whichever_matches_better() -> None:
    """Against a loop over slices of 2, 4 and 6 entries, and automatic differentiation; the norm is 1."""
    bounds, norm, victim = (0, 2, 6, 12), 1.0, torch.zeros(1, dtype=torch.long)
    truth = 3 * rand(1, 12, seed=1).double()
    target = truth.clone()
    target[0, 2:6] *= norm / target[0, 2:6].norm()
    distance = SliceError(Targets(target, (12,)), bounds, norm)
    assert float(distance(truth.clone(), victim)[0]) < 1e-50, "clipping explains the second slice, without noise"
    guess = (truth + 0.1 * rand(1, 12, seed=2)).requires_grad_()
    logs = []
    for start, stop in itertools.pairwise(bounds):
        g, t = guess[0, start:stop], target[0, start:stop]
        clipped = g * (norm / g.norm()).clamp(max=1)
        least = torch.minimum((g - t).square().sum(), (clipped - t).square().sum())
        logs.append((stop - start) / 12 * (least / t.square().sum()).log())
    expected = torch.stack(logs).sum().exp()
    loss, slope = distance(guess.detach().clone(), victim)
    torch.testing.assert_close(loss[0], expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, guess)[0], rtol=1e-10, atol=1e-14)
    naive = SliceError(Targets(target, (12,)), bounds)(truth.clone(), victim)[1]
    shrinks = (naive * truth)[0, 2:6].sum() > 0
    assert shrinks, "who does not know of clipping makes the gradient of that slice smaller"


def test_the_absolute_error_of_several_rounds_is_least_at_their_median():
    targets, repeats = rand(1, 12, seed=5), rand(1, 4, 12, seed=6)
    distance, victim = AbsoluteError(Targets(targets, (12,)), repeats), torch.zeros(1, dtype=torch.long)
    middle = torch.cat([targets[:, None], repeats], 1).median(1).values
    least, slope = distance(middle.clone(), victim)
    assert not slope.any()
    for seed in range(5):
        other, _ = distance(middle + 0.1 * (rand(1, 12, seed=seed) - 0.5), victim)
        assert float(other) > float(least)


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


def test_the_expectation_over_noise_on_the_dummy_moves_the_squared_error_by_a_constant() -> None:
    """E‖g + n − t‖² = ‖g − t‖² + d·σ²: there is nothing to gain from noise on the dummy gradient."""
    target, draws, sigma = rand(1, 12, seed=1), 40000, 0.3
    error = SquaredError(Targets(target, (12,)), relative=False)
    victims_of = torch.zeros(draws, dtype=torch.long)
    for seed in (2, 3):
        guess = rand(1, 12, seed=seed)
        noise = sigma * torch.randn(draws, 12, generator=generator(seed))
        losses, slopes = error(guess + noise, victims_of)
        plain, slope = error(guess.clone(), victims_of[:1])
        assert float(losses.mean() - plain) == pytest.approx(12 * sigma**2, rel=0.02)
        torch.testing.assert_close(slopes.mean(0, keepdim=True), slope, atol=0.02, rtol=0)
