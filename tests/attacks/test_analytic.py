import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedsim.attacks import AttackConfig
from fedsim.attacks.analytic import AnalyticConfig
from fedsim.errors import ConfigError
from fedsim.learning.models import MLPConfig, Model, build_model
from fedsim.privacy.metrics import score
from tests.attacks.problems import lenet, observe, rand, smooth_images, victims

SHAPE = (1, 12, 12)


def mlp(width=256):
    return build_model(MLPConfig(hidden=(width,)), SHAPE, 10, seed=0)


def noise(count, batch):
    """Images without structure, so that they share as few active neurons as chance allows."""
    return rand(count, batch, *SHAPE, seed=3), victims(count, batch)[1]


def test_one_image_is_exact():
    images, labels = victims(4, shape=SHAPE)
    found = AnalyticConfig().build().reconstruct(observe(mlp(), images, labels))
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-4)
    assert torch.equal(found.labels, labels)
    assert float(found.loss.max()) < 1e-9 and not found.stalled.any()


def test_images_that_a_neuron_sees_alone_are_exact():
    # Orthogonal images: neurons i and i + 3 pass image i alone.
    images = torch.eye(3, 16).view(1, 3, 1, 4, 4)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 10))
    with torch.no_grad():
        module[1].weight.copy_(torch.eye(3, 16).repeat(2, 1))
        module[1].bias.fill_(-0.5)
    found = (
        AnalyticConfig().build().reconstruct(observe(Model(module, (1, 4, 4), 10), images, torch.arange(3)[None]))
    )
    assert min(row.PSNR for row in score(images, found.images)) > 90


def test_most_of_a_small_batch_is_exact_in_a_wide_layer():
    images, labels = noise(4, 4)
    found = AnalyticConfig().build().reconstruct(observe(mlp(1024), images, labels))
    exact = [row.PSNR > 60 for row in score(images, found.images)]
    assert sum(exact) >= 12


def test_without_a_bias_one_image_is_found_up_to_its_brightness():
    module = nn.Sequential(nn.Flatten(), nn.Linear(144, 32, bias=False), nn.ReLU(), nn.Linear(32, 10))
    images = smooth_images(3, SHAPE)[:, None]
    images = images / images.amax((2, 3, 4), keepdim=True)
    found = (
        AnalyticConfig().build().reconstruct(observe(Model(module, SHAPE, 10), images, torch.arange(3)[:, None]))
    )
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-3)


def test_the_loss_is_what_no_combination_of_the_images_explains():
    images, labels = victims(2, shape=SHAPE)
    attack, observation = AnalyticConfig().build(), observe(mlp(), images, labels)
    assert float(attack.matching_loss(observation, images, labels).max()) < 1e-9
    other = images.flip(-1)
    weight = observation.model.layout.views(observation.gradients)["1.weight"]
    for victim in range(2):
        x = other[victim].flatten()
        along = torch.outer(weight[victim] @ x, x) / x.square().sum()
        expected = (weight[victim] - along).square().sum() / weight[victim].square().sum()
        found = attack.matching_loss(observation, other, labels)[victim]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_gradient_of_zero_gives_grey_and_no_crash():
    images, labels = victims(1, 2, SHAPE)
    observation = observe(mlp(), images, labels)
    observation.gradients.zero_()
    assert (AnalyticConfig().build().reconstruct(observation).images == 0.5).all()


def test_models_that_it_cannot_invert_are_refused():
    with pytest.raises(ConfigError, match=r"starts with body.0 \(Conv2d\): use model.name: mlp"):
        AnalyticConfig().check(lenet(), 1)
    module = nn.Sequential(nn.Flatten(), nn.Linear(144, 32, bias=False), nn.ReLU(), nn.Linear(32, 10))
    with pytest.raises(ConfigError, match="1 has no bias, without which only single images"):
        AnalyticConfig().check(Model(module, SHAPE, 10), 2)
    AnalyticConfig().check(mlp(), 64)


@pytest.mark.parametrize("settings", [{"restarts": 2}, {"ignore": ["fc.*"]}])
def test_settings_without_a_meaning_are_refused(settings):
    with pytest.raises(ValidationError, match="a closed form has no use for it"):
        TypeAdapter(AttackConfig).validate_python({"name": "analytic", **settings})
