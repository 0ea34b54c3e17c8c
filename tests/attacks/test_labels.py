from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsim.attacks.labels import known_labels, label_counts, last_linear, recover_labels, sign_rule
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import LocalTraining
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


@given(labels=st.lists(st.integers(0, 9), min_size=2, max_size=40), bias=st.booleans())
@settings(deadline=None, max_examples=30)
def test_counts_are_exact_where_the_model_answers_all_images_alike(labels, bias):
    # With a last layer of zeros every answer is 1/10, and only a constant input reaches it.
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Sigmoid(), nn.Linear(12, 10, bias=bias))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    images = smooth_images(len(labels), (1, 8, 8))[None]
    truth = torch.tensor(labels)[None]
    found = label_counts(observe(Model(module, (1, 8, 8), 10), images, truth))
    assert found.tolist() == [sorted(labels)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [8, 64])
def test_labels_of_batches_are_recovered_before_training(batch, bias):
    model = lenet()
    if not bias:
        model.module.fc.bias = None
        model = Model(model.module, model.shape, 10)
    images, labels = victims(3, batch)
    found = recover_labels(observe(model, images, labels))
    assert found.shape == labels.shape
    wrong = [(torch.bincount(f, minlength=10) - torch.bincount(y, minlength=10)).abs().sum() // 2
             for f, y in zip(found, labels, strict=True)]  # fmt: skip
    assert int(sum(wrong)) <= 0.05 * labels.numel()


def test_several_local_steps_count_as_one_batch():
    images, labels = victims(1, 8)
    observation = observe(lenet(), images, labels)
    twice = replace(observation, gradients=2 * observation.gradients, local=LocalTraining(2, 0.1))
    assert torch.equal(label_counts(twice), label_counts(observation))
