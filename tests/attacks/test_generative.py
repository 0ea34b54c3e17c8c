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
from fedsim.attacks.gradient_matching import loss_at
from fedsim.attacks.learning import LearningContext
from fedsim.attacks.refinement import entries
from fedsim.attacks.residuals import Residuals
from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore
from fedsim.learning.models import Model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import LocalTraining, Observation
from tests.attacks.problems import generator, lenet, observe

SHAPE = (1, 8, 8)
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


def linear_attack(shape: tuple[int, int, int] = SHAPE, **settings: Any) -> Generative:
    residuals = Residuals(torch.full(shape[1:], 0.01))
    learned = Trained(Linear(shape), 0.0, 0.0, 0, 0, residuals)  # type: ignore[arg-type]
    return Generative(
        GenerativeConfig(**{"refine": "none", "latents": LATENTS, **settings}), SquaredError, learned
    )


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


def nearest_to(start: Tensor, sent: Tensor, label: int, variance: float) -> Tensor:
    """Minimise D/2·log‖A x + c − sent‖² + ‖x − start‖²/(2·variance) by its fixed point."""
    slope = torch.full((10, 1), 0.1, dtype=torch.float64)
    slope[label] = -0.9
    eye = torch.eye(64, dtype=torch.float64)
    matrix = torch.cat([torch.kron(slope, eye), eye.new_zeros(10, 64)])
    rest = sent.double() - torch.cat([slope.new_zeros(640), slope[:, 0]])
    x = start.double()
    for _ in range(200):
        ratio = len(sent) / (rest - matrix @ x).square().sum()
        x = torch.linalg.solve(
            ratio * matrix.T @ matrix + eye / variance, ratio * matrix.T @ rest + start / variance
        )
    return x


@pytest.mark.parametrize(("noise", "moves"), [(0.02, True), (0.2, True), (5.0, False)])
def test_pixels_go_as_far_from_the_generator_as_the_gradient_and_the_residuals_say(
    noise: float, moves: bool
) -> None:
    _, images, seen = known(count=2)
    beyond = (images + 0.1 * torch.randn(images.shape, generator=generator(6))).clamp(0, 1)
    assert seen.labels is not None
    seen = observe(seen.model, beyond, seen.labels, know_labels=True)
    draws = torch.randn(seen.gradients.shape, generator=generator(3))
    seen = replace(seen, gradients=seen.gradients + noise * draws)
    drawn = linear_attack().reconstruct(seen)
    found = linear_attack(refine="pixels", refine_iterations=600).reconstruct(seen)
    for victim, sent in enumerate(seen.gradients):
        start = drawn.images[victim].flatten()
        expected = nearest_to(start, sent, victim, 0.01).clamp(0, 1)
        torch.testing.assert_close(found.images[victim].flatten().double(), expected, rtol=0, atol=5e-3)
        assert (float((expected - start).abs().max()) > 0.05) == moves, "what noise hides stays as it was drawn"
    nearer = [float((one.images - beyond).square().mean()) for one in (drawn, found)]
    assert not moves or nearer[1] < nearer[0]
    assert (found.iterations == drawn.iterations + 600).all()


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
    plain = loss_at(noisy, SquaredError, (), images, seen.labels)
    for refine, unknowns in (("none", LATENTS), ("pixels", LATENTS + 64)):
        expected = plain * torch.tensor(unknowns / 650).exp()
        found = linear_attack(refine=refine).matching_loss(noisy, images, seen.labels)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("refine", ["none", "pixels"])
def test_an_unknown_learning_rate_is_estimated(refine: str) -> None:
    _, images, seen = known()
    sent = replace(seen, gradients=0.25 * seen.gradients, local=LocalTraining(1, None))
    found = linear_attack(prior=0, iterations=400, refine=refine).reconstruct(sent)
    assert found.learning_rates is not None
    torch.testing.assert_close(found.learning_rates, torch.full((3,), 0.25), rtol=0.05, atol=0)
    assert min(row.PSNR for row in score(images, found.images)) > 25


def few_images() -> LearningContext:
    model = softmax_regression()
    store = ImageStore(torch.zeros(10, *SHAPE, dtype=torch.uint8), torch.zeros(10, dtype=torch.long))
    return LearningContext(model, model.initial_weights(), store, 1, seed=5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GenerativeConfig().check_public(19, 1), "19 public images are too few"),
        (lambda: GenerativeConfig().build().learn(few_images()), "10 public images are too few"),
        (lambda: GenerativeConfig(ignore=("nope",)).check(lenet(), 1), "matches no parameter"),
        (lambda: GenerativeConfig().build().reconstruct(known()[2]), "has learned nothing"),
        (
            lambda: linear_attack((1, 4, 4)).reconstruct(known()[2]),
            r"draws images of \[1, 4, 4\], the model takes",
        ),
        (lambda: linear_attack().reconstruct(replace(known()[2], labels=None)), "generative needs the labels"),
    ],
)
def test_what_cannot_be_done_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


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
