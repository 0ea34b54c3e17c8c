from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.attacks.generative import GenerativeConfig
from fedsim.attacks.generator import Trained
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.learning import LearningContext
from fedsim.attacks.strategies import apply
from fedsim.defenses.dp import GaussianConfig
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.learning.batches import ImageStore
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Knowledge, Observation
from tests.attacks.problems import generator, lenet, observe, rand, smooth_images

SMALL: dict[str, Any] = {"latents": 4, "width": 32, "steps": 400, "batch": 64, "training_rate": 5e-3}


def family(count: int, seed: int) -> Tensor:
    """Images of three patterns, light and dark, around mid-grey, in [0, 1]."""
    patterns = smooth_images(3, (1, 16, 16)) - 0.5
    return (0.5 + torch.einsum("nk,kchw->nchw", 4 * rand(count, 3, seed=seed) - 2, patterns)).clamp(0, 1)


def public(count: int, seed: int = 1) -> ImageStore:
    images = (family(count, seed) * 255).round().to(torch.uint8)
    return ImageStore(images, torch.arange(count) % 10)


@pytest.fixture(scope="module")
def context() -> LearningContext:
    model = lenet()
    return LearningContext(model, model.initial_weights(), public(400), 1, seed=5)


@pytest.fixture(scope="module")
def trained(context: LearningContext) -> Trained:
    learned: Trained = GenerativeConfig(**SMALL).build().learn(context)
    return learned


def seen_by(context: LearningContext, count: int, seed: int = 77) -> tuple[Tensor, Observation]:
    images, labels = family(count, seed)[:, None], torch.arange(count)[:, None] % 10
    return images, observe(context.model, images, labels, know_labels=True)


def test_restarts_are_chosen_by_the_loss(context: LearningContext, trained: Trained) -> None:
    _, seen = seen_by(context, 4)
    one, three = (
        GenerativeConfig(**SMALL, iterations=20, restarts=restarts, refine="none")
        .build()
        .taught(trained)
        .reconstruct(seen)
        for restarts in (1, 3)
    )
    assert (three.loss <= one.loss * (1 + 1e-4)).all() and (three.loss < 0.999 * one.loss).any()


def test_victims_do_not_depend_on_their_company(context: LearningContext, trained: Trained) -> None:
    _, seen = seen_by(context, 3)
    attack = GenerativeConfig(**SMALL, iterations=10, refine_iterations=5).build().taught(trained)
    together = attack.reconstruct(seen)
    for victim in range(3):
        alone = attack.reconstruct(seen.select(slice(victim, victim + 1)))
        torch.testing.assert_close(alone.images[0], together.images[victim], rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_bits_whatever_the_adversary(
    context: LearningContext, trained: Trained
) -> None:
    weights = context.weights
    knowledge = Knowledge(GaussianConfig(sigma=0.3), {}, {}, weights.new_zeros(0, 0, len(weights)))
    attack = GenerativeConfig(**SMALL, iterations=10, refine_iterations=5).build()
    again = attack.learn(replace(context, knowledge=knowledge, weights=weights + 1))
    for name, value in trained.generator.state_dict().items():
        assert torch.equal(value, again.generator.state_dict()[name])
    assert trained.ceiling == again.ceiling
    _, seen = seen_by(context, 2)
    one, other = (attack.taught(learned).reconstruct(seen) for learned in (trained, again))
    assert torch.equal(one.images, other.images) and torch.equal(one.loss, other.loss)
    assert attack.learn(replace(context, seed=6)).ceiling != trained.ceiling


def test_the_generator_draws_held_out_images_better_than_their_mean(
    context: LearningContext, trained: Trained
) -> None:
    images = family(200, seed=1)
    blind = float(-10 * (images - images.mean(0)).square().flatten(1).mean(1).log10().mean())
    assert trained.ceiling >= trained.read > blind + 3
    assert trained.images == 360 and trained.held_out == 40
    assert f"{trained.ceiling:.1f} dB" in GenerativeConfig(**SMALL).build().report(trained)


def test_a_prior_of_the_right_images_helps_against_noise(context: LearningContext, trained: Trained) -> None:
    images, seen = seen_by(context, 6)
    noise = 1e-3 * torch.randn(seen.gradients.shape, generator=generator(3))
    seen = replace(seen, gradients=seen.gradients + noise)
    found = GenerativeConfig(**SMALL, iterations=150).build().taught(trained).reconstruct(seen)
    without = GIAConfig(iterations=150).build().reconstruct(seen)
    blind = family(400, seed=1).mean(0).expand(6, 1, 1, 16, 16)
    ours, gia, floor = (
        sum(row.PSNR for row in score(images, x)) / 6 for x in (found.images, without.images, blind)
    )
    assert ours > max(gia, floor) + 6


def test_who_knows_the_slices_or_infers_them_does_better_than_the_naive(
    context: LearningContext, trained: Trained
) -> None:
    images, clean = seen_by(context, 3)
    bounds, noisy = torch.arange(11) * clean.gradients.shape[1] // 10, torch.zeros(3, 10, dtype=torch.bool)
    noisy[0, ::2], noisy[1, 1::2], noisy[2, 5:] = True, True, True
    where = noisy.to(clean.gradients).repeat_interleave(bounds.diff(), 1)
    noise = 0.05 * torch.randn(where.shape, generator=generator(3))
    knowledge = Knowledge(
        GradDefenseConfig(sigma=0.05),
        {"slice_bounds": bounds},
        {"selected": noisy},
        clean.gradients[:, None][:, :0],
    )
    seen = replace(clean, gradients=clean.gradients + where * noise, knowledge=knowledge)
    attack = GenerativeConfig(**SMALL, iterations=150, refine="none").build().taught(trained)
    naive, inferred, told = (
        sum(row.PSNR for row in score(images, attack.reconstruct(apply(name, seen, attack)).images)) / 3
        for name in ("", "slices", "told_slices")
    )
    assert min(inferred, told) > naive + 6


def test_pixels_go_beyond_the_generator_where_the_gradient_is_exact(
    context: LearningContext, trained: Trained
) -> None:
    images = smooth_images(3, (1, 16, 16), seed=50)[:, None]
    seen = observe(context.model, images, torch.arange(3)[:, None], know_labels=True)
    found = [
        GenerativeConfig(**SMALL, iterations=50, refine=refine).build().taught(trained).reconstruct(seen)
        for refine in ("none", "pixels")
    ]
    drawn, beyond = (sum(row.PSNR for row in score(images, one.images)) / 3 for one in found)
    assert beyond > drawn + 10
    assert (found[1].iterations == 350).all() and (found[1].loss < found[0].loss).all()
