from dataclasses import fields, replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import fedsim.attacks.published_dlg as published
from fedsim.attacks import AttackConfig
from fedsim.attacks.distances import SquaredError
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.dummies import EXACT, MID_GREY, Dummies, Found
from fedsim.attacks.gradient_matching import GradientMatching
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Observation
from tests.attacks.problems import generator, lenet, observe, victims

SHAPE = (1, 12, 12)


def attacked(init, count=2, batch=1, noise=0.0, **settings):
    images, labels = victims(count, batch, SHAPE)
    observation = observe(lenet(init, SHAPE), images, labels)
    if noise:
        draw = torch.randn(observation.gradients.shape, generator=generator(3))
        observation = replace(observation, gradients=observation.gradients + noise * draw)
    return images, labels, observation, DLGConfig(**settings).build().reconstruct(observation)


@pytest.mark.parametrize("init", ["default", "uniform"])
@pytest.mark.parametrize("ignore", [(), ("fc.*",)])
def test_images_and_labels_are_found(init, ignore):
    images, labels, _, found = attacked(init, ignore=ignore)
    assert min(row.PSNR for row in score(images, found.images)) > 35
    assert torch.equal(found.labels, labels)
    assert (found.loss < EXACT).all() and not (found.stalled | found.exhausted).any()


def test_batches_are_found_up_to_their_order():
    images, labels, _, found = attacked("uniform", count=1, batch=2)
    rows = score(images, found.images)
    assert min(row.PSNR for row in rows) > 30
    assert [int(found.labels[0, row.matched]) for row in rows] == labels[0].tolist()


def test_what_is_reported_is_true():
    images, _, observation, found = attacked("uniform", iterations=30)
    assert found.images.shape == images.shape
    assert found.exhausted.all() and not found.stalled.any() and (found.iterations == 30).all()
    assert found.seconds > 0
    dummies = Dummies(observation, None)
    matching = GradientMatching(observation, SquaredError)
    start = dummies.start(dummies.everyone, MID_GREY, 0, torch.float32)
    before, _ = dummies.evaluate(matching, start, dummies.everyone)
    assert (found.loss < before).all()


def test_noise_is_converged_to_not_stalled_at():
    # No image has this gradient: the search ends at a loss far from 0, and has done what there was to do.
    _, _, _, found = attacked("uniform", noise=0.3)
    assert (found.loss > 1e-3).all()
    assert not (found.stalled | found.exhausted).any()


def test_more_restarts_never_end_higher():
    _, _, observation, once = attacked("uniform", noise=0.3)
    thrice = DLGConfig(restarts=3).build().reconstruct(observation)
    assert (thrice.loss <= once.loss).all() and (thrice.loss < once.loss).any()


def test_solved_victims_are_not_tried_again():
    _, _, observation, once = attacked("uniform")
    again = DLGConfig(restarts=3).build().reconstruct(observation)
    assert torch.equal(once.images, again.images)


def test_a_victim_is_attacked_alike_whoever_is_beside_it():
    _, _, observation, together = attacked("uniform", count=3, iterations=20, precision="float64")
    for victim in range(3):
        alone = observation.select(slice(victim, victim + 1))
        single = DLGConfig(iterations=20, precision="float64").build().reconstruct(alone)
        torch.testing.assert_close(single.images[0], together.images[victim], rtol=1e-5, atol=1e-6)


def test_dummies_depend_on_seed_and_restart_alone():
    images, labels = victims(3, shape=SHAPE)
    observation = observe(lenet("default", SHAPE), images, labels)
    dummies = Dummies(observation, None)
    start = dummies.start(dummies.everyone, MID_GREY, 0, torch.float32)
    some = dummies.start(torch.tensor([2, 1]), MID_GREY, 0, torch.float32)
    assert torch.equal(some, start[[2, 1]])
    assert not torch.equal(dummies.start(dummies.everyone, MID_GREY, 1, torch.float32), start)
    assert len({float(row[0]) for row in start}) == 3


def test_an_observation_holds_no_ground_truth():
    images, labels = victims(2, shape=SHAPE)
    observation = observe(lenet("default", SHAPE), images, labels)
    reachable = [getattr(observation, field.name) for field in fields(Observation)]
    tensors = [value for value in reachable if isinstance(value, torch.Tensor)]
    tensors += list(observation.model.module.state_dict().values())
    assert observation.labels is None
    for tensor in tensors:
        assert tensor.numel() == 0 or tensor.shape[-3:] != images.shape[-3:]
        assert tensor.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


def test_the_published_variant_keeps_torchs_steps(monkeypatch):
    monkeypatch.setattr(published, "OUTER", 1)
    images, labels = victims(2, shape=SHAPE)
    observation = observe(lenet("uniform", SHAPE), images, labels)
    found = DLGConfig(published=True).build().reconstruct(observation)
    for victim in range(2):
        x = _published_reference(observation, victim)
        torch.testing.assert_close(found.images[victim].flatten(), x[:144], rtol=1e-3, atol=1e-3)
    assert (found.iterations == 20).all()


def _published_reference(observation, victim):
    """One call of the published optimiser, written with nothing of ours but the model."""
    dummies = Dummies(observation, None)
    start = dummies.start(dummies.everyone, published.STANDARD_NORMAL, 0, torch.float32)[victim]
    image, label = (t.clone().requires_grad_() for t in (start[:144].view(1, *SHAPE), start[144:].view(1, 10)))
    optimiser = torch.optim.LBFGS([image, label])
    weights = observation.weights.clone().requires_grad_()

    def closure():
        optimiser.zero_grad()
        logits = observation.model.logits(weights, image)
        loss = -(label.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        error = (gradient - observation.gradients[victim]).square().sum()
        image.grad, label.grad = torch.autograd.grad(error, (image, label))
        return error.detach()

    optimiser.step(closure)
    return image.detach().flatten()


def test_a_published_search_that_failed_says_so(monkeypatch):
    monkeypatch.setattr(published, "OUTER", 20)
    shape = (3, 16, 16)
    images, labels = victims(2, shape=shape)
    found = DLGConfig(published=True).build().reconstruct(observe(lenet("default", shape), images, labels))
    assert (found.stalled ^ found.exhausted).all()
    assert max(row.PSNR for row in score(images, found.images)) < 15


def test_torchs_absolute_thresholds_stall_the_published_search():
    images, labels = victims(1, shape=SHAPE)
    found = DLGConfig(published=True).build().reconstruct(observe(lenet("default", SHAPE), images, labels))
    assert found.stalled.all() and not found.exhausted.any() and int(found.iterations) < 100


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"restarts": 0}, {"history": 0}, {"precision": "half"}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(AttackConfig).validate_python({"name": "dlg", **settings})


def test_a_better_outcome_replaces_a_worse_one_and_nothing_else():
    flags = torch.zeros(3, dtype=torch.bool)
    old = Found(torch.zeros(3, 2), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3).long(), flags, flags)
    new = Found(torch.ones(2, 2), torch.tensor([5.0, 1.0]), torch.full((2,), 7), ~flags[:2], flags[:2])
    best = old.improved(torch.tensor([0, 2]), new)
    assert best.loss.tolist() == [1.0, 2.0, 1.0]
    assert best.variables[:, 0].tolist() == [0.0, 0.0, 1.0]
    assert best.iterations.tolist() == [0, 0, 7] and best.stalled.tolist() == [False, False, True]
