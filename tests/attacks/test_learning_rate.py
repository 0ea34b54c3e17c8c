"""Updates whose local learning rate the attacker does not know, against clients that train with torch's SGD."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.attacks.base import AttackSettings
from fedsim.attacks.distances import BalancedError, Distance, Scalable, SquaredError, Targets
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.gia import OBJECTIVES, GIAConfig
from fedsim.attacks.gradient_matching import GradientMatching, loss_at, rates_by_scale
from fedsim.attacks.gradinversion import GradInversionConfig
from fedsim.attacks.labels import recover_labels
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import LocalTraining, Observation
from tests.attacks.problems import double, lenet, observe, rand, victims
from tests.conftest import small_experiment

SHAPE = (1, 12, 12)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def moved(model: Model, images: Tensor, labels: Tensor, steps: int, rate: float) -> Observation:
    """What is seen of clients whose `steps` steps of torch's SGD at a secret `rate` move the weights."""
    start = model.initial_weights()
    updates = []
    for x, y in zip(images, labels, strict=True):
        with torch.no_grad():
            for parameter, value in zip(
                model.module.parameters(), model.layout.views(start).values(), strict=True
            ):
                parameter.copy_(value)
        optimiser = torch.optim.SGD(model.module.parameters(), lr=rate)
        for images_, labels_ in zip(x.chunk(steps), y.chunk(steps), strict=True):
            optimiser.zero_grad()
            F.cross_entropy(model.module(images_), labels_).backward()
            optimiser.step()
        updates.append(start - model.initial_weights())
    seen = observe(model, images, labels, know_labels=True)
    return replace(seen, weights=start, gradients=torch.stack(updates), local=LocalTraining(steps, None))


@pytest.mark.parametrize("steps", [1, 3])
def test_at_the_true_images_the_scale_of_a_convex_toy_tells_the_rate(steps: int) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    images, labels = victims(2, 6, SHAPE)
    images = images.double()
    model = double(Model(module, SHAPE, 10))
    observation = moved(model, images, labels, steps, rate=0.03)
    truth, everyone = F.one_hot(labels, 10).double(), torch.arange(2)
    matching = GradientMatching(observation, SquaredError)
    rates = rates_by_scale(matching, images, truth, everyone)
    assert rates is not None
    torch.testing.assert_close(rates, torch.full((2,), 0.03).double(), rtol=1e-6, atol=0)
    assert float(loss_at(observation, SquaredError, (), images, labels).max()) < 1e-12
    if steps == 1:  # the gradient itself, and hence its multiple, is known in closed form
        answers = model.logits(observation.weights, images[0]).softmax(-1) - truth[0]
        gradient = torch.cat([(answers.mT @ images[0].flatten(1)).flatten(), answers.sum(0)]).detach() / 6
        sent = observation.gradients[0]
        torch.testing.assert_close(rates[0], gradient @ sent / gradient.square().sum(), rtol=1e-9, atol=0)


@given(seed=st.integers(0, 1000), flip=st.booleans())
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("distance", [SquaredError, BalancedError])
def test_no_other_positive_factor_is_nearer(
    distance: Callable[[Targets], Scalable], seed: int, flip: bool
) -> None:
    sent, found = rand(2, 12, seed=seed).double() - 0.3, rand(2, 12, seed=seed + 1).double() - 0.3
    found = -sent if flip else found
    measure, everyone = distance(Targets(sent, (7, 5))), torch.arange(2)
    factor = measure.factor(found, everyone)
    assert (factor > 0).all()
    if flip:
        torch.testing.assert_close(factor, torch.ones_like(factor))
        return
    along = measure(1e-6 * found, everyone)[0] < measure(0 * found, everyone)[0]
    best, _ = measure(factor[:, None] * found, everyone)
    for share in (0.5, 0.99, 1.01, 2.0):
        other, _ = measure(share * factor[:, None] * found, everyone)
        assert (best <= other)[along].all()


@pytest.mark.parametrize("distance", [SquaredError, BalancedError, *OBJECTIVES.values()])
@pytest.mark.parametrize("steps", [1, 2])
def test_derivatives_agree_with_finite_differences(distance: Callable[[Targets], Distance], steps: int) -> None:
    model = double(lenet("uniform", SHAPE))
    images, labels = victims(2, 2, SHAPE)
    images = images.double()
    observation = moved(model, images, labels, steps, rate=0.5)
    dummies, rates, everyone = images + 0.1, torch.tensor([0.3, 0.9]).double(), torch.arange(2)
    truth, matching = F.one_hot(labels, 10).double(), GradientMatching(observation, distance)
    match, tiny = matching(dummies, truth, everyone, rates), 1e-5
    ends = [matching(dummies, truth, everyone, rates * math.exp(s * tiny)).loss for s in (1, -1)]
    torch.testing.assert_close(match.by_log_rate, (ends[0] - ends[1]) / (2 * tiny), rtol=1e-4, atol=1e-9)
    way = rand(*images.shape, seed=2, dtype=torch.float64) - 0.5
    ends = [matching(dummies + s * tiny * way, truth, everyone, rates).loss for s in (1, -1)]
    slopes = (match.by_images * way).flatten(1).sum(1)
    torch.testing.assert_close(slopes, (ends[0] - ends[1]) / (2 * tiny), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "attack",
    [DLGConfig(labels="known", iterations=40, precision="float32"), GIAConfig(iterations=80)],
    ids=lambda attack: attack.name,
)
def test_not_knowing_the_rate_costs_next_to_nothing(attack: AttackSettings, steps: int) -> None:
    images, labels = victims(1, 2, (1, 8, 8))
    blind = moved(lenet("uniform", (1, 8, 8)), images, labels, steps, rate=0.2)
    told = replace(blind, gradients=blind.gradients / 0.2, local=LocalTraining(steps, 0.2))
    found, reference = (attack.build().reconstruct(seen) for seen in (blind, told))
    assert reference.learning_rates is None and found.learning_rates is not None
    torch.testing.assert_close(found.learning_rates, torch.full((1,), 0.2), rtol=1e-2, atol=0)
    means = [sum(row.PSNR for row in score(images, seen.images)) / 2 for seen in (found, reference)]
    assert means[1] > 20 and means[0] > means[1] - 2
    at_truth = attack.build().matching_loss(blind, images, labels)
    assert at_truth is not None and float(at_truth.max()) < 1e-2


def test_gradinversion_estimates_the_rate() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(576, 10)
    )
    images, labels = victims(1, 2, SHAPE)
    model = Model(module, SHAPE, 10)
    seen = moved(model, images, labels, steps=1, rate=0.05)
    seen = replace(seen, statistics=model.statistics(seen.weights, images[0])[None].detach())
    found = GradInversionConfig(iterations=200, restarts=1, labels="known").build().reconstruct(seen)
    assert found.learning_rates is not None
    assert found.learning_rates.tolist() == pytest.approx([0.05], rel=0.05)


@pytest.mark.parametrize("batch", [1, 4])
def test_labels_are_recovered_without_the_rate_where_a_class_is_absent(batch: int) -> None:
    images, labels = victims(3, batch, SHAPE)
    seen = replace(moved(lenet("default", SHAPE), images, labels, 1, rate=0.07), labels=None)
    assert torch.equal(recover_labels(seen), labels.sort(1).values)


@pytest.mark.parametrize("settings", [DLGConfig(), DLGConfig(published=True)])
def test_soft_labels_and_the_rate_are_known_only_together(settings: DLGConfig) -> None:
    images, labels = victims(1, 1, SHAPE)
    with pytest.raises(ConfigError, match="labels: joint"):
        settings.check_unknown_rate()
    with pytest.raises(ConfigError, match="labels: joint"):
        settings.build().reconstruct(moved(lenet("uniform", SHAPE), images, labels, 1, rate=0.1))


def test_only_the_naive_adversary_may_be_without_the_rate() -> None:
    audit = {"local_learning_rate": "estimated", "adversaries": ["naive", "adaptive"]}
    with pytest.raises(ConfigError, match="only the naive adversary"):
        small_experiment(audit=audit, attacks=[{"name": "gia"}])
