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
    """Images N(1/2, basis · basisᵀ), of a mean standard deviation of 0.1 a pixel, and the basis [16, 4]."""
    basis = 0.2 * torch.linalg.qr(torch.randn(16, 4, generator=generator(9))).Q
    draws = torch.randn(count, 4, generator=generator(seed))
    return (0.5 + draws @ basis.T).clamp(0, 1).view(count, *SHAPE), basis


def store(images: Tensor, labels: Tensor) -> ImageStore:
    return ImageStore((images * 255).round().to(torch.uint8), labels)


def context_of(count: int = 600, **changes: Any) -> LearningContext:
    model = linear_model()
    public = store(gaussian_images(count, 1)[0], torch.zeros(count, dtype=torch.long))
    return replace(LearningContext(model, model.initial_weights(), public, 1, seed=3), **changes)


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_the_error_is_that_of_the_wiener_filter_where_that_is_optimal(sigma: float) -> None:
    """Gaussian images behind a linear gradient with Gaussian noise: the least error has a closed form."""
    context = context_of(3000)
    context = replace(context, knowledge=knowing(GaussianConfig(sigma=sigma), context.weights))
    trained = InverterConfig(**SMALL, steps=800, draws=8, learning_rate=3e-3).build().learn(context)
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


def family(count: int, seed: int) -> Tensor:
    """Images between three patterns, which a few hundred of them tell of."""
    shares = rand(count, 3, seed=seed)
    shares = shares / shares.sum(1, keepdim=True)
    return torch.einsum("nk,kchw->nchw", shares, smooth_images(3, (1, 16, 16)))


@pytest.fixture(scope="module")
def lenet_context() -> LearningContext:
    model = lenet()
    labels = torch.randint(0, 10, (400,), generator=generator(2))
    public = store(family(400, seed=1), labels)
    return LearningContext(model, model.initial_weights(), public, 1, seed=5)


def test_one_who_trains_through_the_defense_does_better_on_what_is_defended() -> None:
    context = context_of(1000)
    images, labels = gaussian_images(40, 77)[0], torch.zeros(40, 1, dtype=torch.long)
    clean = observe(context.model, images[:, None], labels)
    through = replace(context, knowledge=knowing(GaussianConfig(sigma=0.3), context.weights))
    victims = replace(through, public=store(images, labels[:, 0]))
    sent = victims.observed(torch.arange(40)[:, None], clean.gradients, generator(8))
    attack, errors = InverterConfig(**SMALL, steps=300).build(), []
    for knowing_that in (context, through):
        found = attack.taught(attack.learn(knowing_that)).reconstruct(replace(clean, gradients=sent))
        errors.append(float((found.images[:, 0] - images).square().mean()))
    blind = float((images - 0.5).square().mean())
    assert errors[1] < 0.9 * min(errors[0], blind)


def test_learned_images_are_public_ones_alone() -> None:
    """What is learned depends on the context alone, which holds no victim: see `tests/privacy/test_audit.py`."""
    context, taken = context_of(50), []

    class Noting(ImageStore):
        def take(self, indices: Any) -> tuple[Tensor, Tensor]:
            taken.append(indices)
            return super().take(indices)

    noting = replace(context, public=Noting(context.public.images, context.public.labels))
    InverterConfig(**SMALL, steps=40).build().learn(noting)
    assert {int(i) for indices in taken for i in indices.flatten()} == set(range(50))


def test_victims_are_attacked_alike_to_the_bit_in_any_shards(lenet_context: LearningContext) -> None:
    images, labels = family(7, seed=78), torch.arange(7)
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
    images, labels = family(8, seed=79).view(4, 2, 1, 16, 16), torch.arange(8).view(4, 2)
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
    images, labels = family(2, seed=80), torch.arange(2)
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
