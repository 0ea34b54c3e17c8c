from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fedsim.attacks import AttackConfig
from fedsim.attacks.inverter import InverterConfig
from fedsim.attacks.inverter_network import matched
from fedsim.attacks.learning import LearningContext
from fedsim.defenses.base import DefenseSettings
from fedsim.defenses.dp import GaussianConfig
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore
from fedsim.learning.models import Model
from fedsim.privacy.observation import Knowledge
from tests.attacks.problems import generator, lenet, observe, rand, smooth_images

SHAPE = (1, 4, 4)
SMALL = {"width": 32, "batch": 64, "components": 24}


def knowing(settings: DefenseSettings, weights: Tensor, **public: Tensor) -> Knowledge:
    return Knowledge(settings, public, {}, weights.new_zeros(0, 0, len(weights)))


def linear_model(classes: int = 3) -> Model:
    """Softmax regression at zero weights: the gradient of a class's images is linear in them."""
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(16, classes)), SHAPE, classes)
    for parameter in model.module.parameters():
        nn.init.zeros_(parameter)
    return model


def gaussian_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images N(1/2, basis · basisᵀ) of rank 4, of standard deviation 0.1, and that basis [16, 4]."""
    basis = 0.1 * torch.linalg.qr(torch.randn(16, 4, generator=generator(9))).Q * 2
    draws = torch.randn(count, 4, generator=generator(seed))
    return (0.5 + draws @ basis.T).clamp(0, 1).view(count, *SHAPE), basis


def store(images: Tensor, labels: Tensor) -> ImageStore:
    return ImageStore((images * 255).round().to(torch.uint8), labels)


def context_of(count: int = 600, **changes: Any) -> LearningContext:
    model = linear_model()
    public = store(gaussian_images(count, 1)[0], torch.zeros(count, dtype=torch.long))
    return replace(LearningContext(model, model.initial_weights(), public, 1, seed=3), **changes)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_the_error_is_that_of_the_wiener_filter_where_that_is_optimal(sigma: float) -> None:
    """Gaussian images behind a linear gradient with Gaussian noise: the least error has a closed form."""
    context = context_of(3000)
    context = replace(context, knowledge=knowing(GaussianConfig(sigma=sigma), context.weights))
    trained = InverterConfig(**SMALL, steps=800, draws=8).build().learn(context)
    _, basis = gaussian_images(1, 1)
    # The weight gradient is (p − y) xᵀ with p uniform over three classes: ‖p − y‖² = 2/3.
    noise = sigma**2 / (2 / 3)
    powers = torch.linalg.eigvalsh(basis @ basis.T).clamp(min=0)
    least = float((powers * noise / (powers + noise)).sum()) / 16
    quantised = 1 / 255**2 / 12
    assert 0.9 * least < trained.error < 1.15 * (least + quantised)


def test_the_noise_of_rounds_that_are_averaged_is_less() -> None:
    knowledge = knowing(GaussianConfig(sigma=0.3), context_of(10).weights)
    once, often = (
        InverterConfig(**SMALL, steps=200).build().learn(context_of(knowledge=knowledge, rounds=rounds)).error
        for rounds in (1, 8)
    )
    assert often < 0.7 * once


@pytest.fixture(scope="module")
def lenet_context() -> LearningContext:
    model = lenet()
    labels = torch.randint(0, 10, (400,), generator=generator(2))
    public = store(smooth_images(400, (1, 16, 16), seed=1), labels)
    return LearningContext(model, model.initial_weights(), public, 1, seed=5)


def test_one_who_trains_through_the_defense_does_better_on_what_is_defended(
    lenet_context: LearningContext,
) -> None:
    images, labels = smooth_images(12, (1, 16, 16), seed=77), torch.arange(12) % 10
    clean = observe(lenet_context.model, images[:, None], labels[:, None])
    bounds = torch.arange(11) * clean.gradients.shape[1] // 10
    settings = GradDefenseConfig(sigma=0.02)
    through = replace(lenet_context, knowledge=knowing(settings, clean.weights, slice_bounds=bounds))
    batches = torch.arange(12)[:, None]
    sent = replace(through, public=store(images, labels)).observed(batches, clean.gradients, generator(8))
    attack = InverterConfig(**SMALL, steps=250).build()
    errors = []
    for context in (lenet_context, through):
        learned = attack.learn(context)
        found = attack.taught(learned).reconstruct(replace(clean, gradients=sent))
        errors.append(float((found.images[:, 0] - images).square().mean()))
    blind = float((lenet_context.take(torch.arange(400)[:, None])[0].mean((0, 1)) - images).square().mean())
    assert errors[1] < 0.8 * errors[0] and errors[1] < 0.8 * blind


def test_victims_are_attacked_alike_to_the_bit_in_any_shards(lenet_context: LearningContext) -> None:
    images, labels = smooth_images(7, (1, 16, 16), seed=78), torch.arange(7)
    seen = observe(lenet_context.model, images[:, None], labels[:, None])
    attack = InverterConfig(**SMALL, steps=60).build()
    learned, again = attack.learn(lenet_context), attack.learn(lenet_context)
    whole = attack.taught(learned).reconstruct(seen)
    for shards in ([slice(0, 1), slice(1, 7)], [slice(0, 4), slice(4, 7)]):
        parts = [attack.taught(again).reconstruct(seen.select(shard)) for shard in shards]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    turned = attack.taught(learned).reconstruct(replace(seen, gradients=seen.gradients[order]))
    assert torch.equal(turned.images, whole.images[order])
    assert whole.labels[:, 0].tolist() == list(range(7)), "an undefended gradient betrays its label"
    assert not whole.stalled.any() and torch.equal(whole.loss, torch.full((7,), learned.error))


def test_another_seed_learns_otherwise(lenet_context: LearningContext) -> None:
    attack = InverterConfig(**SMALL, steps=20).build()
    assert attack.learn(lenet_context).error != attack.learn(replace(lenet_context, seed=6)).error


def test_images_of_a_batch_are_matched_whichever_order_they_are_found_in() -> None:
    images, orders = rand(5, 4, 1, 3, 3, seed=1), [torch.randperm(4, generator=generator(s)) for s in range(5)]
    found = torch.stack([batch[order] for batch, order in zip(images, orders, strict=True)])
    assert torch.equal(matched(found + 0.01, images), torch.stack(orders))


def test_batches_are_inverted_as_a_set(lenet_context: LearningContext) -> None:
    pairs = replace(lenet_context, batch_size=2)
    images, labels = smooth_images(8, (1, 16, 16), seed=79).view(4, 2, 1, 16, 16), torch.arange(8).view(4, 2)
    attack = InverterConfig(**SMALL, steps=150).build()
    seen = observe(pairs.model, images, labels)
    found = attack.taught(attack.learn(pairs)).reconstruct(seen)
    assert found.images.shape == images.shape and found.labels.shape == labels.shape
    blind = pairs.take(torch.arange(400)[:, None])[0].mean((0, 1)).expand_as(images)
    order = matched(found.images, images)[:, :, None, None, None]
    ours = (found.images - images.take_along_dim(order, 1)).square().mean()
    assert ours < 0.9 * (blind - images).square().mean()


def test_ignored_parameters_are_not_looked_at(lenet_context: LearningContext) -> None:
    attack = InverterConfig(**SMALL, steps=10, ignore=("fc.*",)).build()
    images, labels = smooth_images(2, (1, 16, 16), seed=80), torch.arange(2)
    seen = observe(lenet_context.model, images[:, None], labels[:, None])
    taught = attack.taught(attack.learn(lenet_context))
    changed = seen.gradients.clone()
    seen.model.layout.views(changed)["fc.weight"].add_(1)
    one, other = (taught.reconstruct(replace(seen, gradients=g)).images for g in (seen.gradients, changed))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InverterConfig().check(lenet(), 17), "at most 16 images a gradient, not 17"),
        (lambda: InverterConfig(ignore=("nope",)).check(lenet(), 1), "matches no parameter"),
        (lambda: InverterConfig().build().learn(context_of(1)), "1 public images are too few"),
        (lambda: InverterConfig().build().reconstruct(None), "has learned nothing"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_done_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("settings", "message"), [({"restarts": 2}, "applied once"), ({"public": "svhn"}, "'test'")]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(AttackConfig).validate_python({"name": "inverter", **settings})
