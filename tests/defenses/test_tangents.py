import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsim.defenses import pld, tangents
from fedsim.defenses.tangents import Dual, Unsupported, client_by_client, push_forward
from tests.defenses.defense_cases import draw, lenet, seeded, tiny_model

IMAGES, DIRECTIONS = draw(3, 4, 2, 6, 6), draw(5, 4, 2, 6, 6, seed=1) - 0.5


class Residual(nn.Module):
    """Branches, poolings, padding, several activations, arithmetic, methods and functions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, x):
        x = torch.tanh(self.first((x - 0.5) / 0.3))
        y = F.silu(self.norm(self.second(x))) * (x > 0)
        z = torch.cat([x + y, F.max_pool2d(x, 3, 1, 1) * y.relu()], dim=1)
        return F.avg_pool2d(z, 2).view(z.size(0), -1)[:, 1:]


FUNCTIONS = {
    "residual": seeded(Residual),
    "convolution first": seeded(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 4))
    ),
    "no bias": seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(), nn.Flatten())),
    "activation first": seeded(lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(2, 3, 3, groups=1), nn.Flatten())),
}


def reference(function):
    """One direction and one client after the other, by torch.func."""
    pairs = [[torch.func.jvp(function, (x,), (v,)) for x in IMAGES] for v in DIRECTIONS]
    values = torch.stack([pair[0] for pair in pairs[0]])
    return values, torch.stack([torch.stack([pair[1] for pair in row]) for row in pairs])


@pytest.mark.parametrize("push", [push_forward, client_by_client])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_values_and_derivatives_are_those_of_torch_func(function, push):
    values, derivatives = push(function, IMAGES, DIRECTIONS)
    expected = reference(function)
    assert torch.allclose(values, expected[0], atol=1e-12)
    assert torch.allclose(derivatives, expected[1], atol=1e-12)


def test_the_fast_rules_are_used(monkeypatch):
    monkeypatch.setattr(tangents, "_scaled", None)
    with pytest.raises(TypeError):
        push_forward(FUNCTIONS["convolution first"], IMAGES, DIRECTIONS)
    monkeypatch.setattr(tangents, "_linear_map", None)
    with pytest.raises(TypeError):
        push_forward(nn.Sequential(nn.Flatten(), nn.Linear(72, 3).double()), IMAGES, DIRECTIONS)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x.flatten(1), inplace=True),
        lambda x: x.flatten(1).sigmoid_(),
        lambda x: x.flatten(1).__iadd__(1.0),
        lambda x: x.flatten(1).chunk(2, dim=1)[0],
        lambda x: torch.ones(12, 3),
    ],
    ids=["inplace", "sigmoid_", "iadd", "chunk", "constant"],
)
def test_what_cannot_carry_tangents_is_refused(function):
    before = IMAGES.clone()
    with pytest.raises(Unsupported):
        push_forward(function, IMAGES, DIRECTIONS)
    assert torch.equal(IMAGES, before)


def test_a_dual_looks_like_its_primal():
    dual = Dual(draw(4, 3), draw(2, 4, 3))
    assert dual.shape == (4, 3) and dual.dtype == torch.float64 and dual.dim() == 2


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.ReLU(inplace=True)], ids=["fast", "in place"])
def test_probed_norms_of_both_ways_agree(activation, monkeypatch):
    model = tiny_model()
    model.module[1] = activation
    images, probes = draw(2, 4, 1, 3, 3), draw(3, 4, 1, 3, 3, seed=2) - 0.5
    found = pld.probed_norms(model, model.initial_weights(), images, probes)
    monkeypatch.setattr(pld, "push_forward", client_by_client)
    expected = pld.probed_norms(model, model.initial_weights(), images, probes)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_a_lenet_takes_the_fast_way(monkeypatch):
    monkeypatch.setattr(pld, "client_by_client", None)
    model = lenet()
    images = draw(1, 2, *model.shape, dtype=torch.float32)
    result = pld.probed_norms(model, model.initial_weights(), images, images)
    assert result[1].shape == (1, 2, 588)
