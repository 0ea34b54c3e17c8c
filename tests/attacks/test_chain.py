"""The chain's sweeps against a graph of a graph, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.chain import chain_of
from fedsim.learning.models import LeNet4Config, Model, build_model
from tests.attacks.problems import Perceptron, double, lenet, rand


def reference(model, weights, images, probabilities, v):
    """Gradients and pull-backs problem by problem, by torch.autograd alone."""
    gradients, by_images, by_probabilities = [], [], []
    for x, p, direction in zip(images, probabilities, v, strict=True):
        w = weights.clone().requires_grad_()
        x, p = x.clone().requires_grad_(), p.clone().requires_grad_()
        loss = -(p * F.log_softmax(model.logits(w, x), -1)).sum(-1).mean()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        found = torch.autograd.grad(g @ direction, (x, p))
        gradients.append(g.detach())
        by_images.append(found[0])
        by_probabilities.append(found[1])
    return torch.stack(gradients), torch.stack(by_images), torch.stack(by_probabilities)


def assert_agrees(engine, model, weights, problems=3, batch=2):
    images = rand(problems, batch, *model.shape, seed=1, dtype=torch.float64)
    probabilities = rand(problems, batch, model.classes, seed=2, dtype=torch.float64).softmax(-1)
    v = rand(problems, len(weights), seed=3, dtype=torch.float64) - 0.5
    gradients, pullback = engine.gradients(images, probabilities)
    found = (gradients, *pullback(v))
    for ours, theirs in zip(found, reference(model, weights, images, probabilities, v), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * float(theirs.abs().max()))


@st.composite
def chains(draw):
    channels, height, width = draw(st.integers(1, 3)), draw(st.integers(6, 9)), draw(st.integers(6, 9))
    shape, layers = (channels, height, width), []
    for _ in range(draw(st.integers(0, 3))):
        out, kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        stride, padding = draw(st.integers(1, 4)), draw(st.integers(0, 3))
        if min(height, width) + 2 * padding < kernel:
            continue
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=draw(st.booleans())))
        layers += draw(st.sampled_from([[nn.Sigmoid()], [nn.Tanh()], [nn.ReLU()], [nn.LeakyReLU(0.2)], []]))
        channels = out
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
    features = channels * height * width
    layers.append(nn.Flatten())
    if draw(st.booleans()):
        layers += [nn.Linear(features, 6), nn.Tanh()]
        features = 6
    layers.append(nn.Linear(features, 4, bias=draw(st.booleans())))
    return nn.Sequential(*layers), shape


@settings(max_examples=30, deadline=None, derandomize=True)
@given(chains(), st.integers(1, 3))
def test_any_chain_agrees_with_automatic_differentiation(case, batch):
    module, shape = case
    model = double(Model(module, shape, 4))
    weights = model.initial_weights()
    weights = rand(len(weights), seed=4, dtype=torch.float64) - 0.5
    engine = chain_of(model, weights)
    assert engine is not None
    assert_agrees(engine, model, weights, batch=batch)


@pytest.mark.parametrize("init", ["default", "uniform"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_the_lenets_are_chains(init, shape):
    model = double(build_model(LeNet4Config(init=init), shape, 10, seed=0))
    engine = chain_of(model, model.initial_weights())
    assert engine is not None
    assert_agrees(engine, model, model.initial_weights(), problems=2, batch=1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2), nn.Flatten(), nn.Linear(32, 4)),
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(128, 4)),
        nn.Sequential(nn.Conv2d(1, 2, (3, 1)), nn.Flatten(), nn.Linear(96, 4)),
        nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(128, 4)),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Softmax(-1)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.ReLU(), nn.Linear(8, 4)),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(1, 2), nn.Flatten(), nn.Linear(72, 4)),
        Perceptron(64, 4),
    ],
)
def test_anything_else_is_left_to_automatic_differentiation(module):
    model = double(Model(module, (1, 8, 8), 4))
    weights = model.initial_weights()
    assert chain_of(model, weights) is None
    assert_agrees(Autodiff(model, weights), model, weights)


def test_layers_that_share_weights_are_no_chain():
    shared = nn.Linear(8, 8)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(8, 4))
    model = double(Model(module, (1, 8, 8), 4))
    assert chain_of(model, model.initial_weights()) is None
    assert_agrees(Autodiff(model, model.initial_weights()), model, model.initial_weights())


def test_batch_norm_in_train_mode_is_differentiated_through():
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4))
    model = double(Model(module, (1, 6, 6), 4))
    weights = model.initial_weights()
    assert model.has_batch_norm and chain_of(model, weights) is None
    assert_agrees(Autodiff(model, weights), model, weights, problems=2, batch=2)


def test_a_problem_in_a_batch_gets_what_it_gets_alone():
    model = lenet()
    engine = chain_of(model, model.initial_weights())
    images, probabilities = rand(5, 1, *model.shape), rand(5, 1, 10, seed=1).softmax(-1)
    v = rand(5, model.layout.dimension, seed=2)
    together, pullback = engine.gradients(images, probabilities)
    by_images, _ = pullback(v)
    for i in range(5):
        alone, pull = engine.gradients(images[i : i + 1], probabilities[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(by_images[i : i + 1], pull(v[i : i + 1])[0], rtol=1e-4, atol=1e-6)
