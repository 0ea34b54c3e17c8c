"""GIA's weight of the total variation, chosen on public images; and the rehearsal that it is chosen by."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.attacks.gia import GIA, GIAConfig, Tuned
from fedsim.attacks.learning import LearningContext
from fedsim.attacks.rehearsal import rehearse
from fedsim.attacks.strategies import strategies_of
from fedsim.config import parse_config
from fedsim.defenses.base import DefenseSettings
from fedsim.defenses.dp import GaussianConfig
from fedsim.defenses.gc import GradientCompressionConfig
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.defenses.none import NoDefenseConfig
from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore
from fedsim.privacy.observation import Knowledge, LocalTraining, Observation
from tests.attacks.problems import gradient_of, lenet, observe, smooth_images, victims

WEIGHTS = (0.0, 3.0, 300.0)
"""Too little, about right, far too much, in one order or another."""


def context_for(defense: DefenseSettings | None = None, **changes: Any) -> LearningContext:
    """Forty public images, and an adversary who knows `defense`; None: the naive one."""
    model = lenet()
    weights = model.initial_weights()
    images = (smooth_images(40, (1, 16, 16), seed=9) * 255).round().to(torch.uint8)
    public = {"slice_bounds": torch.arange(11) * len(weights) // 10}
    known = defense and Knowledge(defense, public, {}, weights.new_zeros(0, 0, len(weights)))
    context = LearningContext(
        model, weights, ImageStore(images, torch.arange(40) % 10), 1, seed=5, knowledge=known
    )
    return replace(context, **changes)


def clean(context: LearningContext, images: Tensor, labels: Tensor) -> Tensor:
    pairs = zip(images, labels, strict=True)
    return torch.stack([gradient_of(context.model, context.weights, x, y) for x, y in pairs])


def pruned(gradients: Tensor, sizes: tuple[int, ...], share: float) -> Tensor:
    """Gradient compression once more, by sorting."""
    parts = []
    for part in gradients.split(sizes, 1):
        order = part.abs().argsort(1)
        parts.append(part.scatter(1, order[:, : int(share * part.shape[1])], 0.0))
    return torch.cat(parts, 1)


def mean_psnr(images: Tensor, found: Tensor) -> float:
    return float((-10 * (images - found).square().flatten(1).mean(1).log10()).mean())


def test_the_chosen_weight_finds_public_images_best_by_a_computation_of_its_own() -> None:
    context = context_for(GradientCompressionConfig(prune=0.8), strategy="survivors")
    settings = GIAConfig(iterations=60, tv=WEIGHTS, tuning_victims=4)
    learned = settings.build().learn(context)
    own = rehearse(context, 4, True)
    labels = own.observation.labels
    assert labels is not None
    sent = pruned(clean(context, own.images, labels), tuple(context.model.layout.sizes), 0.8)
    seen = Observation(
        model=context.model,
        weights=context.weights,
        gradients=sent,
        batch_size=1,
        statistics=sent.new_zeros(4, 0),
        labels=labels,
        seeds=own.observation.seeds,
        trust=(sent != 0).float(),
    )
    scores = [
        mean_psnr(own.images, GIAConfig(iterations=60, tv=weight).build().reconstruct(seen).images)
        for weight in WEIGHTS
    ]
    assert learned.scores == pytest.approx(scores, abs=0.3), "signs of single pixels may be rounded otherwise"
    assert max(scores) > sorted(scores)[1] + 1, "the choice is clear"
    assert learned.choice == WEIGHTS[scores.index(max(scores))]


def test_rehearsed_victims_are_public_images_and_no_image_comes_twice() -> None:
    context = context_for(batch_size=2)
    own = rehearse(context, 20, True)
    public = {image.numpy().tobytes() for image in context.public.images}
    drawn = [(image * 255).round().to(torch.uint8).numpy().tobytes() for image in own.images.flatten(0, 1)]
    assert own.images.shape == (20, 2, 1, 16, 16) and set(drawn) == public
    labels = own.observation.labels
    assert labels is not None and rehearse(context, 20, False).observation.labels is None
    torch.testing.assert_close(own.observation.gradients, clean(context, own.images, labels))
    assert own.observation.knowledge is None, "the naive adversary knows of no defense here either"


def test_rehearsed_victims_protect_what_they_send_with_fresh_draws_each_round() -> None:
    context = context_for(GaussianConfig(sigma=0.1), strategy="average", rounds=3)
    observation = rehearse(context, 4, True).observation
    known = observation.knowledge
    assert known is not None and known.repeats.shape == (4, 2, context.model.layout.dimension)
    undefended = rehearse(context_for(), 4, True).observation.gradients
    noise = torch.cat([observation.gradients[:, None], known.repeats], 1) - undefended[:, None]
    assert noise.std(2) == pytest.approx(0.1, rel=0.05)
    correlation = torch.corrcoef(noise.flatten(0, 1)) - torch.eye(12)
    assert float(correlation.abs().max()) < 0.1, "each victim draws for itself, and anew in each round"


@pytest.mark.parametrize(("strategy", "told"), [("slices", False), ("told_slices", True)])
def test_only_an_oracle_is_told_what_its_own_victims_drew(strategy: str, told: bool) -> None:
    context = context_for(GradDefenseConfig(sigma=0.1), strategy=strategy)
    observation = rehearse(context, 3, True).observation
    known = observation.knowledge
    assert known is not None and set(known.secrets) == ({"selected"} if told else set())
    if told:
        noise = observation.gradients - rehearse(context_for(), 3, True).observation.gradients
        parts = noise.split(known.public["slice_bounds"].diff().tolist(), 1)
        assert torch.equal(torch.stack([part.abs().amax(1) > 0 for part in parts], 1), known.secrets["selected"])


def test_what_is_learned_depends_on_the_seed_alone() -> None:
    context = context_for(GaussianConfig(sigma=0.01), strategy="likelihood")
    attack = GIAConfig(iterations=5, tv=WEIGHTS, tuning_victims=3).build()
    assert attack.learn(context) == attack.learn(context)
    assert attack.learn(context) != attack.learn(replace(context, seed=6))


def test_a_tuned_attack_is_the_attack_with_that_weight() -> None:
    images, labels = victims(2)
    seen = observe(lenet(), images, labels, know_labels=True)
    several, one = GIAConfig(iterations=20, tv=WEIGHTS).build(), GIAConfig(iterations=20, tv=300).build()
    tuned = several.taught(Tuned(WEIGHTS, (1.0, 2.0, 3.0), 4))
    assert torch.equal(tuned.reconstruct(seen).images, one.reconstruct(seen).images)
    losses = [attack.matching_loss(seen, images, labels) for attack in (tuned, one)]
    assert losses[0] is not None and losses[1] is not None and torch.equal(losses[0], losses[1])
    other = GIAConfig(tv=1, objective="l1").build()
    assert isinstance(tuned, GIA) and isinstance(other, GIA)
    rematched = tuned.matching(other.distance)
    assert isinstance(rematched, GIA) and rematched.tv == 300
    for use in (several.reconstruct, lambda seen: several.matching_loss(seen, images, labels)):
        with pytest.raises(ConfigError, match="gia has not chosen `tv` yet: it needs public images"):
            use(seen)


def test_a_weight_must_gain_over_those_before_it_and_all_are_told() -> None:
    tuned = Tuned((0.3, 3.0, 30.0), (7.04, 21.96, 21.96), 8)
    expected = "tv 3 chosen on 8 public victims (0.3: 7.0 dB, 3: 22.0 dB, 30: 22.0 dB)"
    assert tuned.choice == 3 and GIAConfig(tv=[0.3, 3, 30]).build().report(tuned) == expected
    assert Tuned((3.0, 30.0), (94.8, 95.2), 8).choice == 3, "half a decibel is chance"
    assert Tuned((3.0, 30.0), (94.8, 95.4), 8).choice == 30
    assert Tuned((3.0, 0.3, 30.0), (20.0, 20.4, 20.8), 8).choice == 0.3


def test_one_weight_learns_nothing_and_needs_no_public_images() -> None:
    settings = GIAConfig()
    assert settings.public_source is None and not settings.simulates_defense and not settings.rehearses
    assert settings.build().learn(context_for()) is None
    attack = settings.build()
    assert attack.taught(None) is attack
    settings.check_public(0, 1)
    settings.check_unknown_rate()


def test_who_tunes_through_the_defense_also_attacks_without_a_strategy() -> None:
    tuned, plain = GIAConfig(tv=[3, 30]), GIAConfig()
    gc, graddefense = GradientCompressionConfig(), GradDefenseConfig()
    assert strategies_of(gc, "naive", 1, tuned) == ("",)
    assert strategies_of(gc, "adaptive", 1, tuned) == ("simulated", *strategies_of(gc, "adaptive", 1, plain))
    assert strategies_of(graddefense, "oracle", 1, tuned) == ("told_slices",)
    assert strategies_of(NoDefenseConfig(), "adaptive", 1, tuned) == (), "there is nothing to tune through"


@pytest.mark.parametrize(
    ("tv", "message"),
    [
        ([3], "several weights to choose from are two or more, all different, got [3]"),
        ([3, 3.0], "several weights to choose from are two or more, all different"),
        ([], "a weight is a number of at least 0; several to choose from are a list, got []"),
        ([1, -1], "a weight is a number of at least 0"),
        ("smooth", "a weight is a number of at least 0; several to choose from are a list, got 'smooth'"),
        (float("nan"), "a weight is a number of at least 0"),
    ],
)
def test_bad_weights_are_refused_in_one_line(tv: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({"attacks": [{"name": "gia", "tv": tv}]})
    assert str(error.value).startswith("config: attacks.0.tv: ") and message in str(error.value)


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(ConfigError, match="tuning_victims: without several weights `tv` there is nothing to tune"):
        parse_config({"attacks": [{"name": "gia", "tuning_victims": 3}]})
    settings = GIAConfig(tv=[3, 30], tuning_victims=4)
    settings.check_public(8, 2)
    with pytest.raises(
        ConfigError, match=r"gia: 7 public images are too few to tune `tv` on: 4 gradients of 2 image"
    ):
        settings.check_public(7, 2)
    with pytest.raises(ConfigError, match="gia: to choose `tv` on public images takes the clients' learning rate"):
        settings.check_unknown_rate()
    few = replace(context_for(), public=ImageStore(torch.zeros(3, 1, 16, 16, dtype=torch.uint8), torch.arange(3)))
    with pytest.raises(ConfigError, match="3 public images are too few"):
        settings.build().learn(few)


def test_several_local_steps_are_rehearsed_as_clients_take_them() -> None:
    local = LocalTraining(2, 0.1)
    context = context_for(batch_size=4, local=local)
    own = rehearse(context, 2, True)
    labels = own.observation.labels
    assert labels is not None and own.observation.local == local
    weights = context.weights
    for x, y in zip(own.images[0].split(2), labels[0].split(2), strict=True):
        weights = weights - 0.1 * gradient_of(context.model, weights, x, y)
    expected = (context.weights - weights) / 0.1
    torch.testing.assert_close(own.observation.gradients[0], expected.detach(), rtol=1e-3, atol=1e-5)
