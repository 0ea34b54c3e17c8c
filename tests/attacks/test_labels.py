from dataclasses import replace

import pytest
import torch
from torch import nn

from fedsim.attacks.labels import known_labels, last_linear, sign_rule
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from tests.attacks.problems import lenet, observe, smooth_images, victims


@pytest.mark.parametrize("init", ["default", "uniform"])
def test_the_sign_rule_finds_every_label(init):
    images = smooth_images(10, (1, 16, 16))[:, None]
    labels = torch.arange(10)[:, None]
    assert torch.equal(sign_rule(observe(lenet(init), images, labels)), labels)


def test_without_a_bias_the_weights_tell():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Sigmoid(), nn.Linear(12, 10, bias=False))
    images = smooth_images(10, (1, 8, 8))[:, None]
    labels = torch.arange(10)[:, None]
    assert torch.equal(sign_rule(observe(Model(module, (1, 8, 8), 10), images, labels)), labels)


def test_several_images_are_refused_in_one_clear_line():
    images, labels = victims(2, batch=3)
    with pytest.raises(ConfigError, match="each gradient comes from 3: set audit.batch_size to 1"):
        sign_rule(observe(lenet(), images, labels))


def test_a_model_without_a_last_linear_layer_is_refused():
    module = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(ConfigError, match="ends in a fully connected layer"):
        last_linear(Model(module, (1, 8, 8), 10))


def test_known_labels_must_be_there():
    images, labels = victims(2)
    observation = observe(lenet(), images, labels, know_labels=True)
    assert torch.equal(known_labels(observation, "gia"), labels)
    with pytest.raises(ConfigError, match="gia needs the labels"):
        known_labels(replace(observation, labels=None), "gia")
