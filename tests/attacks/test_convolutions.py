"""The three products against PyTorch's own convolution, to the third derivative."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.convolutions import Convolution, FastConvolutions, Geometry
from fedsim.learning.models import Model
from fedsim.privacy.observation import LocalTraining
from tests.attacks.problems import double, rand

GEOMETRIES = [
    Geometry((1, 1), (0, 0), (1, 1), 1),
    Geometry((2, 1), (1, 2), (1, 1), 1),
    Geometry((1, 1), (2, 2), (2, 1), 1),
    Geometry((2, 2), (1, 1), (1, 1), 2),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("how", GEOMETRIES, ids=str)
def test_derivatives_of_every_order_are_pytorchs(how):
    x = rand(2, 4, 6, 5, seed=1, dtype=torch.float64).requires_grad_()
    w = rand(4, 4 // how.groups, 3, 2, seed=2, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(Convolution.apply(x, w, how), F.conv2d(x, w, None, *how))
    assert torch.autograd.gradcheck(lambda x, w: Convolution.apply(x, w, how), (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, w: Convolution.apply(x, w, how), (x, w), fast_mode=True)

    def third(convolve):
        """A derivative of a derivative of a derivative."""
        (by_w,) = torch.autograd.grad(convolve(x, w).sigmoid().sum(), w, create_graph=True)
        (by_x,) = torch.autograd.grad(by_w.square().sum(), x, create_graph=True)
        return torch.autograd.grad(by_x.square().sum(), (x, w))

    ours, theirs = third(lambda x, w: Convolution.apply(x, w, how)), third(lambda x, w: F.conv2d(x, w, None, *how))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding="same"),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), groups=2, bias=False),
    ],
    ids=["same", "circular", "groups"],
)
def test_every_convolution_gives_within_what_it_gives_without(layer):
    x = rand(2, 2, 6, 6)
    with FastConvolutions():
        within = layer(x), F.conv2d(x[0], layer.weight, groups=layer.groups)
    for ours, theirs in zip(within, (layer(x), F.conv2d(x[0], layer.weight, groups=layer.groups)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("local", [LocalTraining(1, 1.0), LocalTraining(2, 0.3), LocalTraining(2, None)])
def test_a_problem_alone_is_differentiated_as_it_is_among_others(local):
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)]
    model = double(Model(nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 5)), (2, 6, 6), 5))
    weights, images = model.initial_weights(), rand(1, 4, 2, 6, 6, seed=1, dtype=torch.float64)
    probabilities = rand(1, 4, 5, seed=2, dtype=torch.float64).softmax(-1)
    rates = None if local.learning_rate is not None else torch.tensor([0.2], dtype=torch.float64)
    v, results = rand(1, len(weights), seed=3, dtype=torch.float64), []
    for singly in (False, True):
        gradients, pullback = Autodiff(model, weights, local, singly).gradients(images, probabilities, rates)
        results.append((gradients, *pullback(v)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
