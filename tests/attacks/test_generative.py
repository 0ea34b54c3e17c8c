from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fedsim.attacks import AttackConfig
from fedsim.attacks.distances import SquaredError
from fedsim.attacks.generative import Generative, GenerativeConfig
from fedsim.attacks.generator import Trained
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.gradient_matching import loss_at
from fedsim.attacks.learning import LearningContext
from fedsim.attacks.refinement import entries, justified
from fedsim.attacks.strategies import apply
from fedsim.defenses.dp import GaussianConfig
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore
from fedsim.learning.models import Model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Knowledge, LocalTraining, Observation
from tests.attacks.problems import generator, lenet, observe, rand, smooth_images

SHAPE = (1, 8, 8)
SMALL: dict[str, Any] = {"latents": 4, "width": 32, "steps": 400, "batch": 64, "training_rate": 5e-3}
LATENTS = 3


class Linear(nn.Module):
    """Images that are linear in their latents, around mid-grey: 0.5 + Σ zᵢ basisᵢ."""

    def __init__(self, batch_shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        pixels = batch_shape[0] * batch_shape[1] * batch_shape[2]
        basis = torch.linalg.qr(torch.randn(pixels, LATENTS, generator=generator(9))).Q
        self.register_buffer("basis", (0.5 * basis).contiguous())
        self.shape, self.latents, self.classes = batch_shape, LATENTS, 0

    def forward(self, latents: Tensor, probabilities: Tensor) -> Tensor:
        flat = 0.5 + latents @ self.get_buffer("basis").T
        return flat.view(*flat.shape[:-1], *self.shape)


def linear_attack(**settings: Any) -> Generative:
    learned = Trained(Linear(), 0.0, 0.0, 0, 0)  # type: ignore[arg-type]
    return Generative(GenerativeConfig(refine="none", latents=LATENTS, **settings), SquaredError, learned)


def softmax_regression() -> Model:
    """At zero weights the gradient is linear in the image: (1/10 − y) xᵀ."""
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), SHAPE, 10)
    for parameter in model.module.parameters():
        nn.init.zeros_(parameter)
    return model


def known(count: int = 3, batch: int = 1) -> tuple[Tensor, Tensor, Observation]:
    """Latents [N, B, 3], the images that they stand for, and what a server sees of these."""
    latents = torch.randn(count, batch, LATENTS, generator=generator(4))
    images = Linear()(latents, torch.empty(0))
    labels = torch.arange(count * batch).view(count, batch) % 10
    return latents, images, observe(softmax_regression(), images, labels, know_labels=True)


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


@pytest.mark.parametrize("batch", [1, 2])
def test_a_linear_generator_and_a_linear_gradient_give_the_latents_back(batch: int) -> None:
    _, images, seen = known(batch=batch)
    found = linear_attack(prior=0, iterations=400, restarts=1).reconstruct(seen)
    assert min(row.PSNR for row in score(images, found.images)) > 40
    assert not found.stalled.any()


def most_probable(sent: Tensor, label: int) -> tuple[Tensor, float]:
    """Minimise D/2·log‖A z + c − sent‖² + ‖z‖²/2 by its fixed point; return z and ‖A z + c − sent‖²."""
    basis, slope = Linear().basis.double(), torch.full((10, 1), 0.1, dtype=torch.float64)
    slope[label] = -0.9
    matrix = torch.cat([torch.kron(slope, basis), basis.new_zeros(10, LATENTS)])
    rest = sent.double() - torch.cat([(slope * 0.5).expand(10, 64).flatten(), slope[:, 0]])
    latents = basis.new_zeros(LATENTS)
    for _ in range(50):
        ratio = len(sent) / (rest - matrix @ latents).square().sum()
        system = ratio * matrix.T @ matrix + torch.eye(LATENTS, dtype=torch.float64)
        latents = torch.linalg.solve(system, ratio * matrix.T @ rest)
    return latents, float((rest - matrix @ latents).square().sum())


def test_the_latents_found_in_noise_are_the_most_probable_ones() -> None:
    _, _, seen = known(count=2)
    noise = 0.2 * torch.randn(seen.gradients.shape, generator=generator(3))
    seen = replace(seen, gradients=seen.gradients + noise)
    found = linear_attack(iterations=600).reconstruct(seen)
    for victim, sent in enumerate(seen.gradients):
        expected, distance = most_probable(sent, victim)
        latents = (found.images[victim].flatten() - 0.5) @ Linear().basis / 0.25
        torch.testing.assert_close(latents.double(), expected, rtol=0, atol=5e-3)
        loss = distance / float(sent.square().sum()) * float((expected.square().sum() / len(sent)).exp())
        assert float(found.loss[victim]) == pytest.approx(loss, rel=1e-4)


def test_a_stronger_prior_stays_nearer_to_the_most_probable_image() -> None:
    _, _, seen = known()
    seen = replace(seen, gradients=seen.gradients + torch.randn(seen.gradients.shape, generator=generator(3)))
    sizes = [
        float((linear_attack(prior=prior, iterations=200).reconstruct(seen).images - 0.5).norm())
        for prior in (0, 1, 100)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


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


def test_more_unknowns_must_be_worth_it() -> None:
    before, size = torch.ones(3), torch.tensor([1000.0, 1000.0, 100.0])
    # 100 more unknowns ask for log(before / after) > 100 · log(D) / D: 0.69 of 1000 entries, 4.6 of 100.
    after = torch.tensor([0.49, 0.51, 0.02])
    assert justified(before, after, size, 100).tolist() == [True, False, False]


def test_entries_count_as_far_as_they_are_trusted() -> None:
    _, _, seen = known(count=2)
    trust = torch.zeros_like(seen.gradients)
    trust[0, :100], trust[1, :100], trust[1, 100:200] = 2.0, 1.0, 0.5
    assert entries(seen, ()).tolist() == [650, 650] and entries(seen, ("*.bias",)).tolist() == [640, 640]
    assert entries(replace(seen, trust=trust), ()).tolist() == [100, 150]


def test_the_loss_at_the_truth_is_that_of_a_typical_image() -> None:
    _, images, seen = known()
    assert seen.labels is not None
    noisy = replace(seen, gradients=seen.gradients + 0.1)
    attack = linear_attack()
    plain = loss_at(noisy, SquaredError, (), images, seen.labels)
    expected = plain * torch.tensor(LATENTS / 650).exp()
    torch.testing.assert_close(attack.matching_loss(noisy, images, seen.labels), expected)


def test_an_unknown_learning_rate_is_estimated() -> None:
    _, images, seen = known()
    sent = replace(seen, gradients=0.25 * seen.gradients, local=LocalTraining(1, None))
    attack = linear_attack(prior=0, iterations=400)
    found = attack.reconstruct(sent)
    assert found.learning_rates is not None
    torch.testing.assert_close(found.learning_rates, torch.full((3,), 0.25), rtol=0.05, atol=0)
    assert min(row.PSNR for row in score(images, found.images)) > 25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: GenerativeConfig().check_public(19, 1), "19 public images are too few"),
        (
            lambda c: GenerativeConfig().build().learn(replace(c, public=public(10))),
            "10 public images are too few",
        ),
        (lambda c: GenerativeConfig(ignore=("nope",)).check(lenet(), 1), "matches no parameter"),
        (lambda c: GenerativeConfig().build().reconstruct(None), "has learned nothing"),
        (lambda c: linear_attack().reconstruct(seen_by(c, 1)[1]), r"draws images of \[1, 8, 8\], the model takes"),
        (lambda c: linear_attack().reconstruct(replace(known()[2], labels=None)), "generative needs the labels"),
    ],
)
def test_what_cannot_be_done_is_refused(
    context: LearningContext, call: Callable[[LearningContext], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        call(context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 19}, "greater than or equal to 20"),
        ({"public": "svhn"}, "'test'"),
        ({"refine": "generator"}, "'pixels'"),
        ({"prior": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(AttackConfig).validate_python({"name": "generative", **settings})
