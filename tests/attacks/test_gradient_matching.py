from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fedsim.attacks.gradient_matching as module
from fedsim.attacks.distances import BalancedError, CosineDistance, SquaredError
from fedsim.attacks.gradient_matching import GradientMatching, even_piece, kept_parameters, padded
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import ONE_STEP, LocalTraining
from tests.attacks.problems import Perceptron, balanced, cosine, double, lenet, observe, rand, squared, victims

CASES = [(SquaredError, squared), (CosineDistance, cosine), (BalancedError, balanced)]


@pytest.mark.parametrize(("distance", "definition"), CASES)
@pytest.mark.parametrize("ignore", [(), ("fc.*",), ("*.bias", "body.2.*")])
def test_matching_agrees_with_a_loop_over_problems(distance, definition, ignore):
    model = double(lenet())
    images, labels = victims(2, batch=2)
    observation = observe(model, images.double(), labels)
    matching = GradientMatching(observation, distance, ignore)
    x = rand(3, 2, *model.shape, seed=7, dtype=torch.float64)
    p = rand(3, 2, 10, seed=8, dtype=torch.float64).softmax(-1)
    of = torch.tensor([1, 0, 1])
    match = matching(x, p, of)
    kept = kept_parameters(model.layout, ignore)
    sizes = tuple(model.layout.sizes[model.layout.names.index(name)] for name in kept)
    for row, victim in enumerate(of):
        xi, pi = x[row].clone().requires_grad_(), p[row].clone().requires_grad_()
        weights = observation.weights.clone().requires_grad_()
        loss = -(pi * model.logits(weights, xi).log_softmax(-1)).sum(-1).mean()
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        mine, sent = (
            torch.cat([model.layout.views(v)[name].flatten() for name in kept])
            for v in (gradient, observation.gradients[victim])
        )
        value = definition(mine, sent, sizes)
        by_x, by_p = torch.autograd.grad(value, (xi, pi))
        torch.testing.assert_close(match.loss[row], value.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(match.by_images[row], by_x, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(match.by_probabilities[row], by_p, rtol=1e-7, atol=1e-12)


def test_the_true_image_matches_perfectly():
    model = double(lenet("uniform"))
    images, labels = victims(3, batch=2)
    observation = observe(model, images.double(), labels)
    truth = torch.nn.functional.one_hot(labels, 10).double()
    for distance, _ in CASES:
        match = GradientMatching(observation, distance)(images.double(), truth, torch.arange(3))
        assert float(match.loss.max()) < 1e-25
        assert float(match.by_images.abs().max()) < 1e-12


def test_pieces_change_nothing(monkeypatch):
    model = double(lenet())
    images, labels = victims(5)
    observation = observe(model, images.double(), labels)
    arguments = images.double() + 0.1, torch.full((5, 1, 10), 0.1, dtype=torch.float64), torch.arange(5)
    whole = GradientMatching(observation, SquaredError)(*arguments)
    monkeypatch.setitem(module.PIECE_BYTES, "cpu", 2 * 8 * model.layout.dimension)
    pieces = GradientMatching(observation, SquaredError)
    assert pieces.piece == 2
    torch.testing.assert_close(pieces(*arguments).by_images, whole.by_images, rtol=1e-10, atol=1e-14)


def test_any_model_can_be_matched():
    model = double(Model(Perceptron(64, 10), (1, 8, 8), 10))
    images, labels = victims(2, shape=(1, 8, 8))
    observation = observe(model, images.double(), labels)
    truth = torch.nn.functional.one_hot(labels, 10).double()
    matching = GradientMatching(observation, SquaredError)
    assert float(matching(images.double(), truth, torch.arange(2)).loss.max()) < 1e-25
    assert float(matching(images.double() + 0.1, truth, torch.arange(2)).loss.min()) > 1e-6


def test_precision_can_be_raised():
    model = lenet()
    images, labels = victims(1)
    matching = GradientMatching(observe(model, images, labels), SquaredError, dtype=torch.float64)
    match = matching(images.double(), torch.full((1, 1, 10), 0.1, dtype=torch.float64), torch.arange(1))
    assert match.loss.dtype == match.by_images.dtype == torch.float64


@pytest.mark.parametrize(
    ("ignore", "message"),
    [(("linear.*",), "'linear.*' matches no parameter of body.0.weight"), (("*",), "nothing is left")],
)
def test_patterns_must_make_sense(ignore, message):
    with pytest.raises(ConfigError, match=message):
        kept_parameters(lenet().layout, ignore)


def test_gradients_that_are_not_finite_are_refused():
    images, labels = victims(3)
    observation = observe(lenet(), images, labels)
    gradients = observation.gradients.clone()
    gradients[1, 5] = torch.nan
    with pytest.raises(ConfigError, match="gradient of victim 1"):
        GradientMatching(replace(observation, gradients=gradients), partial(SquaredError, relative=True))


def test_a_gradient_of_zero_can_be_matched_without_nan():
    images, labels = victims(1)
    observation = observe(lenet(), images, labels)
    silent = replace(observation, gradients=torch.zeros_like(observation.gradients))
    truth = torch.nn.functional.one_hot(labels, 10).float()
    for distance, _ in CASES:
        match = GradientMatching(silent, distance)(images, truth, torch.arange(1))
        assert torch.isfinite(match.loss).all() and torch.isfinite(match.by_images).all()


def test_a_frozen_module_is_matched_like_any_other():
    module_ = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model = double(Model(module_, (1, 8, 8), 10))
    images, labels = victims(1, shape=(1, 8, 8))
    observation = observe(model, images.double(), labels)
    for parameter in module_.parameters():
        parameter.requires_grad_(False)
    truth = torch.nn.functional.one_hot(labels, 10).double()
    assert float(GradientMatching(observation, SquaredError)(images.double(), truth, torch.arange(1)).loss) < 1e-25


def test_several_local_steps_are_simulated():
    """Against a client that takes the steps with torch's SGD, and a derivative by finite differences."""
    model = double(lenet())
    images, labels = victims(1, batch=6)
    images, local = images.double(), LocalTraining(steps=3, learning_rate=0.2)
    start = model.initial_weights()
    optimiser = torch.optim.SGD(model.module.parameters(), lr=0.2)
    for x, y in zip(images[0].split(2), labels[0].split(2), strict=True):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model.module(x), y).backward()
        optimiser.step()
    update = (start - model.initial_weights()) / 0.2
    observation = replace(observe(model, images, labels), weights=start, gradients=update[None], local=local)
    truth = torch.nn.functional.one_hot(labels, 10).double()
    matching, everyone = GradientMatching(observation, SquaredError), torch.arange(1)
    assert float(matching(images, truth, everyone).loss) < 1e-25
    one_step = GradientMatching(replace(observation, local=ONE_STEP), SquaredError)
    assert float(one_step(images, truth, everyone).loss) > 1e-3
    dummy = images + 0.1 * rand(*images.shape, seed=1, dtype=torch.float64)
    direction, tiny = rand(*images.shape, seed=2, dtype=torch.float64) - 0.5, 1e-5
    ends = [matching(dummy + sign * tiny * direction, truth, everyone).loss for sign in (1, -1)]
    slope = (matching(dummy, truth, everyone).by_images * direction).sum()
    torch.testing.assert_close(slope, ((ends[0] - ends[1]) / (2 * tiny))[0], rtol=1e-5, atol=1e-10)


@given(problems=st.integers(1, 500), most=st.integers(1, 300))
def test_even_pieces_are_few_and_of_few_sizes(problems, most):
    """What a GPU evaluates: no more pieces than needed, less than twice the work, a power of two if that fits."""
    piece = even_piece(problems, most)
    rows = padded(torch.arange(problems), piece)
    assert piece <= most and len(rows) % piece == 0 and len(rows) // piece <= -(-problems // most)
    assert len(rows) < 2 * problems + len(rows) // piece
    assert piece == most or piece & (piece - 1) == 0
    assert torch.equal(rows[:problems], torch.arange(problems)) and not rows[problems:].any()
