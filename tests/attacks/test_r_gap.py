from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fedsim.attacks import AttackConfig
from fedsim.attacks.r_gap import RGAPConfig, rank_analysis
from fedsim.errors import ConfigError
from fedsim.learning.models import ConvNet64Config, LeNet4Config, MLPConfig, Model, build_model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import LocalTraining
from tests.attacks.problems import Perceptron, double, lenet, observe, rand, victims

SHAPE = (1, 12, 12)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def found_in(model, images, labels, **settings):
    return RGAPConfig(**settings).build().reconstruct(observe(model, images, labels))


@pytest.mark.parametrize("init", ["default", "uniform"])
def test_lenets_give_the_image_away_as_far_as_rounding_goes(init):
    images, labels = victims(2, shape=SHAPE)
    found = found_in(lenet(init, SHAPE), images, labels)
    assert min(row.PSNR for row in score(images, found.images)) > 80
    assert torch.equal(found.labels, labels) and not found.stalled.any()
    assert float(found.loss.max()) < 1e-6


@pytest.mark.parametrize("config", [LeNet4Config(), MLPConfig(hidden=(32, 16))])
def test_other_chains_are_inverted_as_well(config):
    images, labels = victims(1, shape=SHAPE)
    found = found_in(build_model(config, SHAPE, 10, seed=0), images, labels)
    assert min(row.PSNR for row in score(images, found.images)) > 60


@st.composite
def chains(draw):
    channels, side, layers = draw(st.integers(1, 2)), draw(st.integers(4, 6)), []
    shape = channels, side, side
    for _ in range(draw(st.integers(0, 2))):
        out, kernel = draw(st.integers(2, 8)), draw(st.integers(1, 3))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=draw(st.booleans())))
        layers += draw(st.sampled_from([[nn.Sigmoid()], [nn.Tanh()], [nn.LeakyReLU(0.3)], [nn.ReLU()], []]))
        channels, side = out, (side + 2 * padding - kernel) // stride + 1
    layers.append(nn.Flatten())
    features = channels * side * side
    if draw(st.booleans()):
        layers += [nn.Linear(features, 9), nn.Sigmoid()]
        features = 9
    layers.append(nn.Linear(features, 10, bias=draw(st.booleans())))
    return nn.Sequential(*layers), shape


@given(chains(), st.integers(0, 50))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_full_rank_in_every_layer_means_an_exact_image(case, seed):
    module, shape = case
    model = double(Model(module, shape, 10))
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(0.6 * rand(*parameter.shape, seed=seed + number).double() - 0.3)
    images, labels = victims(1, shape=shape)
    images = images.double()
    ranks = rank_analysis(model, model.initial_weights(), images[0, 0], int(labels[0, 0]))
    assume(all(rank.deficiency == 0 and rank.condition < 1e3 for rank in ranks))
    torch.testing.assert_close(found_in(model, images, labels).images, images, rtol=0, atol=1e-4)


def small_case(module: nn.Module) -> tuple[Model, Tensor, Tensor]:
    """The model of a module on 1×8×8 in float64, with one victim's image and label."""
    images, labels = victims(1, shape=(1, 8, 8))
    return double(Model(module, (1, 8, 8), 10)), images.double(), labels


def test_what_no_equation_reaches_is_counted_and_stays_grey():
    # Kernels of one pixel at stride 2 pass over three pixels in four.
    module = nn.Sequential(nn.Conv2d(1, 3, 1, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 10))
    model, images, labels = small_case(module)
    first, last = rank_analysis(model, model.initial_weights(), images[0, 0], int(labels[0, 0]))
    assert (first.layer, first.unknowns, first.rank, first.deficiency) == ("0.weight", 64, 16, 48)
    assert (first.weight_constraints, first.gradient_constraints) == (48, 3)
    assert last.deficiency == 0
    found = found_in(model, images, labels).images[0, 0, 0]
    torch.testing.assert_close(found[::2, ::2], images[0, 0, 0, ::2, ::2], rtol=0, atol=1e-6)
    assert (found[1::2] == 0.5).all() and (found[:, 1::2] == 0.5).all()


def test_outputs_that_relu_cut_off_make_no_weight_constraints():
    module = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    model, images, labels = small_case(module)
    first, _ = rank_analysis(model, model.initial_weights(), images[0, 0], int(labels[0, 0]))
    with torch.no_grad():
        active = int((module[0](images[0]) > 0).sum())
    assert 0 < active < 512 and first.weight_constraints == active
    torch.testing.assert_close(found_in(model, images, labels).images, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_learning_rate_need_not_be_known(bias):
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(384, 10, bias=bias)
    )
    images, labels = victims(2, shape=(1, 8, 8))
    seen = observe(double(Model(module, (1, 8, 8), 10)), images.double(), labels)
    blind = replace(seen, gradients=0.03 * seen.gradients, local=LocalTraining(1, None))
    found = RGAPConfig().build().reconstruct(blind)
    assert found.learning_rates is not None
    assert found.learning_rates.tolist() == pytest.approx([0.03] * 2, rel=1e-4)
    assert min(row.PSNR for row in score(images, found.images)) > 60
    assert RGAPConfig().build().reconstruct(seen).learning_rates is None


def test_a_coarser_resolution_keeps_noise_out():
    images, labels = victims(2, shape=SHAPE)
    seen = observe(lenet("uniform", SHAPE), images, labels)
    noise = torch.randn(seen.gradients.shape, generator=torch.Generator().manual_seed(0))
    sizes = seen.model.layout.sizes
    parts = zip(seen.gradients.split(sizes, 1), noise.split(sizes, 1), strict=True)
    sent = torch.cat([g + 0.1 * g.square().mean().sqrt() * n for g, n in parts], 1)
    fine, coarse = (
        sum(row.PSNR for row in score(images, RGAPConfig(resolution=r).build().reconstruct(found).images)) / 2
        for r in (1e-6, 0.3)
        for found in [replace(seen, gradients=sent)]
    )
    assert coarse > fine + 0.5


@pytest.mark.parametrize("silent", [True, False])
def test_gradients_of_zero_or_noise_alone_crash_nothing(silent):
    images, labels = victims(1, shape=SHAPE)
    seen = observe(lenet("default", SHAPE), images, labels)
    other = torch.zeros_like(seen.gradients) if silent else rand(*seen.gradients.shape, seed=3) - 0.5
    found = RGAPConfig().build().reconstruct(replace(seen, gradients=other))
    assert torch.isfinite(found.images).all()


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (lenet(), 4, "each gradient comes from 4"),
        (Model(Perceptron(144, 10), SHAPE, 10), 1, "needs a plain chain"),
        (build_model(ConvNet64Config(), (1, 12, 12), 10, seed=0), 1, "needs a plain chain"),
        (
            Model(nn.Sequential(nn.Conv2d(1, 64, 3), nn.Flatten(), nn.Linear(57600, 10)), (1, 32, 32), 10),
            1,
            "GiB for the equations of 0.weight",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_invert_is_refused_in_one_line(model, batch, message, monkeypatch):
    monkeypatch.setattr("fedsim.attacks.r_gap.MOST_BYTES", 2**28)
    with pytest.raises(ConfigError, match=message) as caught:
        RGAPConfig().check(model, batch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"restarts": 2}, {"ignore": ["fc.*"]}, {"resolution": 0}])
def test_settings_without_a_meaning_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(AttackConfig).validate_python({"name": "r_gap", **settings})
