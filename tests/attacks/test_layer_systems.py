"""The equations of a layer against PyTorch's own layers, and their solution against LAPACK's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsim.attacks.activations import ACTIVATIONS, activation_of
from fedsim.attacks.chain import Entries, chain_of
from fedsim.attacks.last_layer import last_layer
from fedsim.attacks.layer_systems import LayerSystem, layer_system
from fedsim.learning.models import Model
from tests.attacks.problems import double, rand


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (2, 3, 1), (5, 2, 2)])
def test_the_true_input_fulfils_every_equation(kernel, stride, padding):
    conv = nn.Conv2d(2, 3, kernel, stride, padding)
    size = conv(torch.zeros(1, 2, 7, 6)).numel()
    model = double(Model(nn.Sequential(conv, nn.Sigmoid(), nn.Flatten(), nn.Linear(size, 10)), (2, 7, 6), 10))
    x = rand(1, 2, 7, 6, seed=1).double()
    z = conv(x)
    delta = rand(*z.shape, seed=2).double() - 0.5
    (gradient,) = torch.autograd.grad((z * delta).sum(), conv.weight)
    chain = chain_of(model, model.initial_weights())
    rows = [t.detach()[0].permute(1, 2, 0).flatten(0, 1) for t in (delta, z)]
    unknown = rows[1].clone()
    unknown[0, 0] = torch.nan
    ordered = gradient.permute(0, 2, 3, 1).flatten(1)
    for seen, expected in ((rows[1], z.numel()), (unknown, z.numel() - 1)):
        system = layer_system(chain.layers[0], chain.own[0], ordered, rows[0], seen)
        assert system.weight_constraints == expected
        flat = x[0].permute(1, 2, 0).flatten()
        torch.testing.assert_close(system.matrix @ flat, system.values, rtol=1e-9, atol=1e-9)


def test_directions_that_are_open_stay_where_they_start_as_the_least_change_does():
    matrix = rand(20, 6, seed=1).double() @ rand(6, 9, seed=2).double()
    start, truth = rand(9, seed=3).double(), rand(9, seed=4).double()
    system = LayerSystem(matrix, matrix @ truth, 0)
    least = torch.linalg.lstsq(matrix, (matrix @ (truth - start))[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(system.solve(start, 1e-4), start + least, rtol=0, atol=1e-6)
    expected = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(system.singular_values(), expected, rtol=0, atol=1e-6 * float(expected[0]))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("label", [0, 3])
def test_the_last_layer_is_told_by_its_gradient_alone(known, bias, label):
    weight, x = rand(5, 7, seed=1).double() - 0.5, 3 * rand(7, seed=2).double()
    offset = rand(5, seed=3).double() if bias else None
    logits = weight @ x if offset is None else weight @ x + offset
    delta = logits.softmax(-1) - F.one_hot(torch.tensor(label), 5)
    factor = 1.0 if known else 0.07
    own = Entries(weight[None], None if offset is None else offset[None], weight[None])
    sent = Entries(factor * torch.outer(delta, x)[None], factor * delta[None] if bias else None, weight[None])
    found = last_layer(own, sent, known)
    torch.testing.assert_close(found.input, x, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.delta, delta, rtol=1e-5, atol=0)
    assert found.rate == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize("module", [*(kind() for kind in ACTIVATIONS), nn.LeakyReLU(0.2)], ids=str)
def test_activations_know_their_derivatives_and_inverses(module):
    activation = activation_of(module)
    z = torch.linspace(-3, 3, 40, dtype=torch.float64, requires_grad=True)
    a = activation.function(z)
    torch.testing.assert_close(a, module(z))
    (slope,) = torch.autograd.grad(a.sum(), z)
    torch.testing.assert_close(activation.slope(a).detach(), slope)
    back = activation.inverse(a.detach())
    told = back.isfinite()
    torch.testing.assert_close(back[told], z.detach()[told])
    assert told.all() or (slope[~told] == 0).all()
    beyond = activation.inverse(torch.tensor([-1.5, 2.0], dtype=torch.float64))
    if isinstance(module, nn.Sigmoid | nn.Tanh):
        assert beyond.isnan().all()


def test_activations_of_other_kinds_are_not_known():
    assert activation_of(nn.GELU()) is None and activation_of(nn.LeakyReLU(-0.1)) is None
