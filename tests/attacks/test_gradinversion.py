import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional as F

from fedsim.attacks import AttackConfig
from fedsim.attacks.gradinversion import GradInversionConfig, StatisticsError, group_distance
from fedsim.attacks.labels import recover_labels
from fedsim.data.datasets import DigitsConfig, load_dataset
from fedsim.errors import ConfigError
from fedsim.learning import batch_norm
from fedsim.learning.models import Model
from fedsim.preparation import prepare
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import LocalTraining
from fedsim.randomness import Purpose, torch_stream
from tests.attacks.problems import lenet, observe, rand, victims
from tests.conftest import small_experiment

SHAPE = (1, 12, 12)


def normed(dtype=torch.float32):
    """Two convolutions with batch norm and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolutions = [
            part
            for channels in (1, 12)
            for part in (nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        ]
        module = nn.Sequential(*convolutions, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(12 * 16, 10))
    return Model(module.to(dtype), SHAPE, 10)


def observed(count=2, batch=1, dtype=torch.float32):
    images, labels = victims(count, batch, SHAPE)
    model, images = normed(dtype), images.to(dtype)
    observation = observe(model, images, labels, know_labels=True)
    statistics = torch.stack([model.statistics(observation.weights, x) for x in images])
    return images, labels, replace(observation, statistics=statistics)


def slow_error(observation, victim, images):
    """The statistics' error by hooks on the layers' inputs, of one dummy batch, channel by channel."""
    inputs, norms = [], list(batch_norm.layers(observation.model.module))
    hooks = [norm.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for norm in norms]
    observation.model.logits(observation.weights, images)
    for hook in hooks:
        hook.remove()
    sent, total = iter(observation.statistics[victim].split(12)), 0.0
    for entering in inputs:
        means, variances = next(sent), next(sent)
        for channel, (m, v) in enumerate(zip(means, variances, strict=True)):
            values = entering[:, channel].flatten()
            scale = v + 1e-5
            total = total + (values.mean() - m) ** 2 / scale
            total = total + (values.var(correction=0) - v) ** 2 / scale**2
    return total / 24


def test_the_error_of_the_statistics_is_as_defined():
    _, _, observation = observed(batch=3, dtype=torch.float64)
    dummies, of = rand(3, 3, *SHAPE, seed=9, dtype=torch.float64), torch.tensor([1, 0, 1])
    errors, slopes = StatisticsError(observation)(dummies, of)
    for row, victim in enumerate(of):
        x = dummies[row].clone().requires_grad_()
        expected = slow_error(observation, victim, x)
        (slope,) = torch.autograd.grad(expected, x)
        torch.testing.assert_close(errors[row], expected.detach())
        torch.testing.assert_close(slopes[row], slope)


def test_the_true_images_show_the_statistics_that_were_sent():
    images, _, observation = observed(batch=2)
    errors, _ = StatisticsError(observation)(images, torch.arange(2))
    assert float(errors.max()) < 1e-8


def test_where_averages_normalise_they_stand_in_for_statistics():
    images, _, observation = observed(batch=2)
    module = observation.model.module.eval()
    batch_norm.load_averages(module, observation.statistics[0])
    silent = replace(observation, statistics=observation.statistics[:, :0])
    errors, _ = StatisticsError(silent)(images, torch.arange(2))
    assert float(errors[0]) < 1e-8 < 1e-4 < float(errors[1])


def test_of_several_local_steps_the_last_one_counts():
    images, _, observation = observed(batch=4)
    last = torch.stack([observation.model.statistics(observation.weights, x[2:]) for x in images])
    observation = replace(observation, statistics=last, local=LocalTraining(steps=2, learning_rate=0.1))
    errors, slopes = StatisticsError(observation)(images, torch.arange(2))
    assert float(errors.max()) < 1e-8
    _, slopes = StatisticsError(observation)(images + 0.1, torch.arange(2))
    assert not slopes[:, :2].any() and slopes[:, 2:].any()


def test_the_pull_of_the_group_contracts_it_about_its_mean():
    images = rand(6, 2, *SHAPE, seed=4, dtype=torch.float64)
    distance, pull = group_distance(images, 3)
    means = images.view(2, 3, -1).mean(1).repeat_interleave(3, 0)
    torch.testing.assert_close(distance, (images.flatten(1) - means).square().mean(1))
    pixels = images[0].numel()
    moved = images - 0.25 * pixels / 2 * pull
    torch.testing.assert_close(moved.flatten(1) - means, 0.75 * (images.flatten(1) - means))


def plain_loop(observation, victim, settings):
    """One group by torch's Adam and automatic differentiation; the images and losses of all its restarts."""
    model, labels = observation.model, observation.labels[victim]
    streams = [torch_stream(observation.seeds[victim], Purpose.ATTACK, r) for r in range(settings.restarts)]
    x = torch.stack([torch.rand(1, *SHAPE, generator=stream) for stream in streams]).double().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=1.0)
    weights, target = observation.weights.clone().requires_grad_(), observation.gradients[victim]
    best = [(math.inf, None)] * settings.restarts
    for step in range(settings.iterations):
        slopes = torch.zeros_like(x)
        for row, dummy in enumerate(x):
            loss = F.cross_entropy(model.logits(weights, dummy), labels)
            (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
            left_open = (gradient - target).square().sum() / target.square().sum()
            left_open = left_open + settings.statistics * slow_error(observation, victim, dummy)
            variation = dummy.diff(dim=-2).abs().mean() + dummy.diff(dim=-1).abs().mean()
            total = left_open * (settings.tv * variation).exp()
            if total.item() < best[row][0]:
                best[row] = (total.item(), dummy.detach().clone())
            apart = (dummy - x.detach().mean(0)).square().mean()
            direction = left_open + left_open.item() * (settings.tv * variation + settings.group * apart)
            slopes[row] = torch.autograd.grad(direction, x)[0][row]
        x.grad = slopes
        warm, progress = min(1, (step + 1) / 50), step / settings.iterations
        optimiser.param_groups[0]["lr"] = settings.learning_rate * warm * (1 + math.cos(math.pi * progress)) / 2
        optimiser.step()
        x.data.clamp_(0, 1)
    return min(best, key=lambda pair: pair[0])


def test_it_does_what_the_plain_loop_does():
    _, _, observation = observed(dtype=torch.float64)
    settings = GradInversionConfig(iterations=12, restarts=3, labels="known", learning_rate=0.5, group=20.0)
    found = settings.build().reconstruct(observation)
    for victim in range(2):
        loss, best = plain_loop(observation, victim, settings)
        assert float(found.loss[victim]) == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(found.images[victim], best, rtol=0, atol=1e-6)


def test_a_stronger_group_keeps_its_searches_closer_together():
    _, labels, observation = observed(batch=2)
    spreads = [
        float(group_distance(attack.search(observation, labels).images, 4)[0].mean())
        for attack in (GradInversionConfig(iterations=60, group=group).build() for group in (0.0, 100.0))
    ]
    assert spreads[1] < 0.5 * spreads[0]


def test_statistics_make_images_better():
    images, _, observation = observed()
    with_, without = (
        GradInversionConfig(iterations=200, restarts=1, labels="known", statistics=weight).build()
        for weight in (1.0, 0.0)
    )
    psnr = [
        sum(row.PSNR for row in score(images, attack.reconstruct(observation).images)) / 2
        for attack in (with_, without)
    ]
    assert psnr[0] > psnr[1] + 3 and psnr[0] > 25


def test_labels_are_recovered():
    _, _, observation = observed(batch=4)
    found = GradInversionConfig(iterations=2).build().reconstruct(replace(observation, labels=None))
    assert torch.equal(found.labels, recover_labels(observation))
    assert not GradInversionConfig().knows_labels


def test_the_loss_reported_is_the_loss_of_what_is_returned():
    images, labels, observation = observed(batch=2)
    attack = GradInversionConfig(iterations=20, labels="known").build()
    found = attack.reconstruct(observation)
    torch.testing.assert_close(found.loss, attack.matching_loss(observation, found.images, labels))
    assert float(attack.matching_loss(observation, images, labels).max()) < 1e-6


def test_victims_do_not_depend_on_their_company_and_noise_moves_them():
    _, _, observation = observed(count=3)
    noisy, still = (GradInversionConfig(iterations=10, restarts=2, noise=n).build() for n in (0.2, 0.0))
    together = noisy.reconstruct(observation)
    for victim in range(3):
        alone = noisy.reconstruct(observation.select(slice(victim, victim + 1)))
        torch.testing.assert_close(alone.images[0], together.images[victim], rtol=0, atol=1e-3)
    ends = [attack.search(observation, observation.labels).images for attack in (noisy, still)]
    assert not torch.equal(*ends)


def test_models_without_batch_norm_and_victims_without_statistics_are_refused():
    with pytest.raises(ConfigError, match="the model has none"):
        GradInversionConfig().check(lenet(), 1)
    GradInversionConfig().check(normed(), 1)
    _, _, observation = observed()
    silent = replace(observation, statistics=observation.statistics[:, :0])
    with pytest.raises(ConfigError, match="needs the batch-norm statistics"):
        GradInversionConfig().build().reconstruct(silent)


def test_an_experiment_without_batch_norm_is_refused_before_any_work():
    config = small_experiment(attacks=[{"name": "gradinversion"}])
    with pytest.raises(ConfigError, match="gradinversion matches batch-norm statistics") as raised:
        prepare(config, load_dataset(DigitsConfig()))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [{"statistics": -1}, {"group": -1}, {"noise": -1}, {"restarts": 0}, {"x": 3}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(AttackConfig).validate_python({"name": "gradinversion", **settings})
