from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F

from fedsim.attacks import AttackConfig
from fedsim.attacks.gia import GIAConfig
from fedsim.errors import ConfigError
from fedsim.privacy.metrics import score
from fedsim.randomness import Purpose, torch_stream
from tests.attacks.problems import lenet, observe, victims

SHAPE = (1, 12, 12)


def observed(init="uniform", count=2, batch=1):
    images, labels = victims(count, batch, SHAPE)
    return images, labels, observe(lenet(init, SHAPE), images, labels, know_labels=True)


def plain_loop(observation, victim, settings):
    """The published attack on one victim, with torch's Adam and scheduler and automatic differentiation."""
    model, labels = observation.model, observation.labels[victim]
    x = torch.rand(1, *SHAPE, generator=torch_stream(observation.seeds[victim], Purpose.ATTACK, 0))
    x = x.to(observation.weights).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=settings.learning_rate)
    milestones = [int(settings.iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, 0.1)
    weights = observation.weights.clone().requires_grad_()
    best, best_loss = None, torch.inf
    for _ in range(settings.iterations):
        loss = F.cross_entropy(model.logits(weights, x), labels)
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        distance = 1 - F.cosine_similarity(gradient, observation.gradients[victim], dim=0)
        down, across = x.diff(dim=-2).abs().mean(), x.diff(dim=-1).abs().mean()
        variation = settings.tv * (down + across)
        total = distance * variation.exp() if settings.relative_tv else distance + variation
        if total.item() < best_loss:
            best, best_loss = x.detach().clone(), total.item()
        (x.grad,) = torch.autograd.grad(total, x)
        x.grad.sign_()
        optimiser.step()
        scheduler.step()
        x.data.clamp_(0, 1)
    return best, best_loss


@pytest.mark.parametrize("settings", [{"tv": 1e-3, "relative_tv": False}, {"tv": 3.0}])
def test_it_does_what_the_plain_loop_does(settings):
    # In float64 and for few steps, so that no rounding can flip a sign.
    _, _, observation = observed()
    observation.model.module.double()
    doubled = {name: getattr(observation, name).double() for name in ("weights", "gradients")}
    observation = replace(observation, **doubled)
    settings = GIAConfig(iterations=16, **settings)
    found = settings.build().reconstruct(observation)
    for victim in range(2):
        best, loss = plain_loop(observation, victim, settings)
        torch.testing.assert_close(found.images[victim].double(), best.double(), rtol=0, atol=1e-5)
        assert float(found.loss[victim]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("init", ["default", "uniform"])
def test_images_are_found_inside_the_box(init):
    images, labels, observation = observed(init)
    found = GIAConfig(iterations=400).build().reconstruct(observation)
    assert min(row.PSNR for row in score(images, found.images)) > 22
    assert float(found.images.min()) >= 0 and float(found.images.max()) <= 1
    assert torch.equal(found.labels, labels) and not found.stalled.any()


def test_a_muted_layer_is_left_out():
    images, _, observation = observed()
    garbled = observation.gradients.clone()
    views = observation.model.layout.views(garbled)
    views["fc.weight"].normal_(generator=torch.Generator().manual_seed(0))
    observation = replace(observation, gradients=garbled)
    muted = GIAConfig(iterations=300, ignore=("fc.*",)).build().reconstruct(observation)
    naive = GIAConfig(iterations=300).build().reconstruct(observation)
    assert min(r.PSNR for r in score(images, muted.images)) > 5 + max(r.PSNR for r in score(images, naive.images))


def test_restarts_are_chosen_by_the_loss():
    _, _, observation = observed(count=4)
    one = GIAConfig(iterations=60).build().reconstruct(observation)
    three = GIAConfig(iterations=60, restarts=3).build().reconstruct(observation)
    assert (three.loss <= one.loss * (1 + 1e-4)).all() and (three.loss < 0.999 * one.loss).any()


def test_victims_do_not_depend_on_their_company():
    _, _, observation = observed(count=3)
    together = GIAConfig(iterations=10).build().reconstruct(observation)
    for victim in range(3):
        alone = GIAConfig(iterations=10).build().reconstruct(observation.select(slice(victim, victim + 1)))
        torch.testing.assert_close(alone.images[0], together.images[victim], rtol=0, atol=1e-4)


def test_more_variation_weight_gives_smoother_images():
    _, _, observation = observed()
    rough, smooth = (
        GIAConfig(iterations=100, tv=tv).build().reconstruct(observation).images.diff(dim=-1).abs().mean()
        for tv in (0.0, 300.0)
    )
    assert float(smooth) < 0.5 * float(rough)


def test_the_loss_reported_is_the_loss_of_what_is_returned():
    _, labels, observation = observed()
    for settings in (GIAConfig(iterations=50), GIAConfig(iterations=50, tv=1e-3, relative_tv=False)):
        attack = settings.build()
        found = attack.reconstruct(observation)
        torch.testing.assert_close(found.loss, attack.matching_loss(observation, found.images, labels))


def test_a_search_cut_short_is_exhausted(monkeypatch):
    # Without the decay of the step, which would end any search, 30 steps end in the middle of the descent.
    monkeypatch.setattr("fedsim.attacks.gia.DECAY_AT", ())
    _, _, observation = observed()
    assert GIAConfig(iterations=30, learning_rate=0.01).build().reconstruct(observation).exhausted.all()


def test_labels_must_be_known():
    _, _, observation = observed()
    assert GIAConfig().knows_labels
    with pytest.raises(ConfigError, match="gia needs the labels"):
        GIAConfig().build().reconstruct(replace(observation, labels=None))


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"tv": -1}, {"learning_rate": 0}, {"steps": 3}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(AttackConfig).validate_python({"name": "gia", **settings})
