from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.distances import CosineDistance, SquaredError, Targets
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.gradient_matching import GradientMatching
from fedsim.attacks.inverter import InverterConfig
from fedsim.attacks.strategies import STRATEGIES, apply, armed, strategies_of
from fedsim.config import parse_config
from fedsim.defenses.base import ClientBatch, ClientContext, DefenseSettings
from fedsim.defenses.dp import GaussianConfig, LaplacianConfig
from fedsim.defenses.gc import GradientCompressionConfig
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.defenses.none import NoDefenseConfig
from fedsim.errors import ConfigError
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Knowledge, LocalTraining, Observation
from tests.attacks.problems import generator, lenet, observe, rand, victims


def known(observation: Observation, settings: DefenseSettings, **public: Tensor) -> Observation:
    """The observation of an adversary who knows the scheme and sees every victim once."""
    none = observation.gradients[:, None][:, :0]
    return replace(observation, knowledge=Knowledge(settings, public, {}, none))


def defended(
    settings: DefenseSettings, count: int = 3, observations: int = 1, init: str = "default"
) -> tuple[Tensor, Observation, dict[str, Tensor]]:
    """Images, what an adaptive adversary sees of them under a defense, and what the defense drew in secret."""
    model = lenet(init)
    images, labels = victims(count)
    clean = observe(model, images, labels, know_labels=True)
    defense = settings.build()
    sizes = torch.tensor(model.layout.sizes)
    public = {"slice_bounds": torch.arange(11) * int(sizes.sum()) // 10, "probe_seed": torch.tensor([3])}
    batch = ClientBatch(torch.arange(count), images, labels)
    seen = []
    for number in range(observations):
        context = _context(model, clean, batch, public, number)
        seen.append(defense.protect(clean.gradients, context))
    secrets = defense.secrets(_context(model, clean, batch, public, 0))
    knowledge = Knowledge(settings, public, {}, torch.stack(seen[1:] or [seen[0][:0]], 1)[:, : observations - 1])
    if observations == 1:
        knowledge = replace(knowledge, repeats=seen[0][:, None][:, :0])
    return images, replace(clean, gradients=seen[0], knowledge=knowledge), secrets


def _context(
    model: Any, clean: Observation, batch: ClientBatch, public: dict[str, Tensor], number: int
) -> ClientContext:
    generators = [generator(1000 * number + victim) for victim in range(clean.victims)]
    return ClientContext(model, clean.weights, [batch], generators, public)


def psnr(images: Tensor, observation: Observation, strategy: str, iterations: int = 400) -> float:
    attack = GIAConfig(iterations=iterations).build()
    seen = apply(strategy, observation, attack)
    found = armed(strategy, seen, attack).reconstruct(seen).images
    return sum(row.PSNR for row in score(images, found)) / len(images)


@pytest.mark.parametrize("distance", [SquaredError, CosineDistance])
def test_trust_weighs_the_squares_of_every_distance(distance: Any) -> None:
    model = lenet()
    images, labels = victims(2)
    observation = observe(model, images, labels)
    trust = rand(2, model.layout.dimension, seed=3)
    guess, p = rand(2, 1, 1, 16, 16, seed=4), torch.full((2, 1, 10), 0.1)
    everyone = torch.arange(2)
    plain = GradientMatching(observation, distance)
    gradients, _ = plain.engine.gradients(guess, p)
    scaled = [values * trust.sqrt() for values in (gradients, observation.gradients)]
    expected, _ = distance(Targets(scaled[1], model.layout.sizes))(scaled[0], everyone)
    matching = GradientMatching(replace(observation, trust=trust), distance)
    found = matching(guess, p, everyone)
    torch.testing.assert_close(found.loss, expected)
    step = 1e-2 * rand(2, 1, 1, 16, 16, seed=5)
    rise = (matching(guess + step, p, everyone).loss - matching(guess - step, p, everyone).loss) / 2
    torch.testing.assert_close(rise, (found.by_images * step).flatten(1).sum(1), rtol=2e-2, atol=1e-7)


def test_the_noisy_slices_are_named_and_left_out() -> None:
    settings = GradDefenseConfig(sigma=0.02)
    _, observation, secrets = defended(settings)
    attack = GIAConfig(iterations=300).build()
    inferred = apply("slices", observation, attack).trust
    told = replace(observation, knowledge=replace(observation.knowledge, secrets=secrets))  # type: ignore[type-var]
    assert inferred is not None
    assert torch.equal(inferred, apply("told_slices", told, attack).trust)
    widths = observation.knowledge.public["slice_bounds"].diff()  # type: ignore[union-attr]
    assert torch.equal(inferred == 0, secrets["selected"].repeat_interleave(widths, 1))


def test_the_entries_that_the_published_code_also_perturbs_are_left_out() -> None:
    settings = GradDefenseConfig(sigma=0.5, variant="published")
    _, observation, secrets = defended(settings)
    told = replace(observation, knowledge=replace(observation.knowledge, secrets=secrets))  # type: ignore[type-var]
    clean = observe(lenet(), *victims(3)).gradients
    trust = apply("told_slices", told, GIAConfig().build()).trust
    assert trust is not None
    assert torch.equal(trust == 1, observation.gradients == clean)


def test_slices_are_inferred_behind_several_local_steps() -> None:
    model, local = lenet("uniform"), LocalTraining(steps=2, learning_rate=0.1)
    images, labels = victims(2, batch=2)
    clean = observe(model, images, labels, know_labels=True)
    one_hot = torch.nn.functional.one_hot(labels, 10).float()
    updates, _ = Autodiff(model, clean.weights, local).gradients(images, one_hot)
    bounds = torch.arange(11) * updates.shape[1] // 10
    noisy = torch.zeros(2, 10, dtype=torch.bool)
    noisy[0, :5], noisy[1, ::2] = True, True
    mask = noisy.repeat_interleave(bounds.diff(), 1)
    noise = 0.3 * updates.std() * torch.randn(updates.shape, generator=generator(3))
    sent = torch.where(mask, updates + noise, updates)
    observation = known(replace(clean, gradients=sent, local=local), GradDefenseConfig(), slice_bounds=bounds)
    trust = apply("slices", observation, GIAConfig(iterations=200).build()).trust
    assert trust is not None and torch.equal(trust == 0, mask)


def test_who_knows_more_does_no_worse_and_beats_the_naive_attack() -> None:
    images, observation, secrets = defended(GradDefenseConfig(sigma=0.02))
    told = replace(observation, knowledge=replace(observation.knowledge, secrets=secrets))  # type: ignore[type-var]
    naive, adaptive, oracle = psnr(images, observation, ""), psnr(images, observation, "slices"), 0.0
    oracle = psnr(images, told, "told_slices")
    assert adaptive > naive + 10
    assert oracle > adaptive - 1


def test_pruned_entries_are_left_out_and_no_others() -> None:
    images, observation, _ = defended(GradientCompressionConfig(prune=0.3))
    seen = apply("survivors", observation, GIAConfig().build())
    assert seen.trust is not None
    assert torch.equal(seen.trust, (observation.gradients != 0).float())
    assert psnr(images, observation, "survivors") > psnr(images, observation, "") + 10
    soft = apply("thresholds", observation, GIAConfig().build()).trust
    assert soft is not None and torch.equal(soft == 1, seen.trust == 1) and float(soft.min()) > 0


def test_a_layer_that_betrays_itself_by_zeros_is_muted() -> None:
    model = lenet()
    images, labels = victims(2)
    observation = observe(model, images, labels)
    gradients = observation.gradients.clone()
    model.layout.views(gradients)["fc.weight"][:, :, 5] = 0
    seen = apply("muted", known(replace(observation, gradients=gradients), DLGConfig), DLGConfig().build())  # type: ignore[arg-type]
    views = model.layout.views(seen.trust)  # type: ignore[arg-type]
    assert {name: float(view.unique().item()) for name, view in views.items()} == {
        name: float(name != "fc.weight") for name in views
    }
    nothing = known(replace(observation, gradients=torch.zeros_like(gradients)), DLGConfig)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing would be left"):
        apply("muted", nothing, DLGConfig().build())


def test_slices_that_two_rounds_agree_on_are_the_clean_gradient() -> None:
    settings = GradDefenseConfig(sigma=0.5)
    _, observation, _ = defended(settings, observations=6)
    clean = observe(lenet(), *victims(3))
    seen = apply("agreement", observation, GIAConfig().build())
    assert seen.trust is not None
    trusted = seen.trust == 1
    assert torch.equal(seen.gradients[trusted], clean.gradients[trusted])
    assert float(trusted.float().mean()) > 0.7, "of 6 rounds at 1/2, two or more leave a slice alone with 0.89"


def test_noise_averages_out_over_rounds() -> None:
    settings = GaussianConfig(sigma=0.1)
    _, observation, _ = defended(settings, observations=25)
    clean = observe(lenet(), *victims(3)).gradients
    once, often = (
        (gradients - clean).square().mean().sqrt()
        for gradients in (observation.gradients, apply("average", observation, GIAConfig().build()).gradients)
    )
    assert float(once) == pytest.approx(0.1, rel=0.05) and float(often) == pytest.approx(0.02, rel=0.05)


def test_all_rounds_by_the_absolute_error_beat_one_under_laplacian_noise() -> None:
    images, observation, _ = defended(LaplacianConfig(sigma=0.003), observations=9)
    assert psnr(images, observation, "laplace") > psnr(images, observation, "") + 2
    attack = GIAConfig(iterations=20).build()
    found = armed("laplace", observation, attack).reconstruct(observation)
    sent = torch.cat([observation.gradients[:, None], observation.knowledge.repeats], 1)  # type: ignore[union-attr]
    assert observation.labels is not None
    again = observe(lenet(), found.images, observation.labels).gradients
    error = (again[:, None] - sent).abs().sum((1, 2)) / sent.abs().sum((1, 2))
    variation = sum(found.images.diff(dim=dim).abs().mean((1, 2, 3, 4)) for dim in (-1, -2))
    torch.testing.assert_close(found.loss, error * (3 * variation).exp(), rtol=1e-3, atol=0)


def test_parameters_below_the_noise_are_not_trusted() -> None:
    images, observation, _ = defended(GaussianConfig(sigma=0.01))
    seen = apply("likelihood", observation, GIAConfig().build())
    assert seen.trust is not None
    means = [float(view.mean()) for view in observation.model.layout.views(seen.trust).values()]
    signal = observe(lenet(), *victims(3)).gradients
    strong = [float(v.square().mean()) > 1e-3 for v in observation.model.layout.views(signal).values()]
    assert [mean > 0.8 for mean in means] == strong and min(means) < 0.2


def test_each_adversary_has_its_strategies() -> None:
    graddefense, gc = GradDefenseConfig(), GradientCompressionConfig()
    assert strategies_of(graddefense, "naive", 4) == ("",)
    assert strategies_of(graddefense, "adaptive", 1) == ("slices", "denoise")
    assert set(strategies_of(graddefense, "adaptive", 2)) == {"slices", "denoise", "average", "agreement"}
    assert strategies_of(graddefense, "oracle", 1) == ("told_slices",)
    assert strategies_of(gc, "oracle", 1) == (), "the zeros tell all there is to tell"
    inverter = InverterConfig()
    assert strategies_of(gc, "naive", 1, inverter) == ("",)
    assert strategies_of(gc, "adaptive", 1, inverter) == ("simulated",)
    assert strategies_of(gc, "adaptive", 2, inverter) == ("simulated", "simulated_average")
    assert strategies_of(graddefense, "oracle", 2, inverter) == ()
    assert strategies_of(NoDefenseConfig(), "adaptive", 2, inverter) == (), "there is nothing to simulate"


@pytest.mark.parametrize("name", ["none", "graddefense", "gc", "dp_gaussian", "dp_laplacian", "pld"])
def test_every_strategy_that_a_defense_names_exists(name: str) -> None:
    settings = parse_config({"defense": {"name": name}}).defense
    assert {*settings.strategies(), *settings.oracle_strategies()} <= set(STRATEGIES)


def test_dlg_infers_slices_with_labels_unknown() -> None:
    _, observation, secrets = defended(GradDefenseConfig(sigma=1.0), count=2, init="uniform")
    attack = DLGConfig(iterations=300).build()
    seen = apply("slices", replace(observation, labels=None), attack)
    widths = observation.knowledge.public["slice_bounds"].diff()  # type: ignore[union-attr]
    right = (seen.trust == 0) == secrets["selected"].repeat_interleave(widths, 1)
    assert float(right.float().mean()) > 0.9
