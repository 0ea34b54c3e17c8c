from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedsim.learning.batches import ImageStore, Indices, local_batches
from fedsim.learning.execution import HalvingTrainer, choose_execution, choose_memory_format
from fedsim.learning.fused import FusedTrainer
from fedsim.learning.models import ConvNet64Config, CustomModelConfig, LeNetConfig, Model, build_model
from fedsim.learning.training import LocalResult, LoopTrainer, VectorizedTrainer

RATE = 0.1


@pytest.fixture(scope="module")
def model() -> Model:
    return build_model(LeNetConfig(init="uniform"), (1, 28, 28), 10, seed=0)


@pytest.fixture(scope="module")
def data() -> ImageStore:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 1, 28, 28), dtype=np.uint8)
    return ImageStore.of(images, rng.integers(0, 10, 60), "cpu")


def plain_update(model: Model, data: ImageStore, weights: torch.Tensor, batches: list[Indices]) -> torch.Tensor:
    """Independent reference: an optimiser on a plain module, displacement over the learning rate."""
    module = build_model(LeNetConfig(init="uniform"), (1, 28, 28), 10, seed=0).module
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for batch in batches:
        optimizer.zero_grad()
        images = data.images[torch.from_numpy(batch)].float() / 255
        F.cross_entropy(module(images), data.labels[torch.from_numpy(batch)]).backward()
        optimizer.step()
    end = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    return (weights - end) / RATE


TRAINERS = [
    LoopTrainer,
    VectorizedTrainer,
    partial(LoopTrainer, memory_format="channels_last"),
    FusedTrainer,
    partial(FusedTrainer, memory_format="channels_last"),
]


@pytest.mark.parametrize(
    ("trainer", "steps"), [(trainer, 1) for trainer in TRAINERS] + [(trainer, 3) for trainer in TRAINERS[:3]]
)
def test_updates_are_those_of_plain_sgd(trainer: Any, steps: int, model: Model, data: ImageStore) -> None:
    weights = model.initial_weights()
    rng = np.random.default_rng(1)
    schedules = [[rng.choice(60, 8, replace=False) for _ in range(steps)] for _ in range(4)]
    result = trainer(model, data, RATE).train(weights, schedules)
    for row, batches in zip(result.updates, schedules, strict=True):
        assert torch.allclose(row, plain_update(model, data, weights, batches), atol=2e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_clients_with_unequal_batches(trainer: Any, model: Model, data: ImageStore) -> None:
    weights = model.initial_weights()
    schedules = [[np.arange(3)], [np.arange(5, 12)], [np.arange(3)]]
    result = trainer(model, data, RATE).train(weights, schedules)
    assert torch.allclose(result.updates[0], result.updates[2], atol=1e-6)
    assert torch.allclose(result.updates[1], plain_update(model, data, weights, schedules[1]), atol=2e-5)


class Small:
    """A trainer on a device that has room for some clients only."""

    def __init__(self, trainer: LoopTrainer, room: int) -> None:
        self.trainer, self.room, self.widths = trainer, room, list[int]()

    def train(self, weights: torch.Tensor, schedules: list[list[Indices]]) -> LocalResult:
        self.widths.append(len(schedules))
        if len(schedules) > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.trainer.train(weights, schedules)


def test_a_chunk_that_does_not_fit_is_halved(model: Model, data: ImageStore) -> None:
    weights, schedules = model.initial_weights(), [[np.arange(at, at + 4)] for at in range(7)]
    whole = LoopTrainer(model, data, RATE)
    small = Small(whole, room=2)
    halving, expected = HalvingTrainer(small), whole.train(weights, schedules)
    halved = halving.train(weights, schedules)
    assert small.widths == [7, 3, 1, 2, 2, 2]
    assert torch.equal(halved.updates, expected.updates) and torch.equal(halved.losses, expected.losses)
    small.widths.clear()
    halving.train(weights, schedules)
    assert small.widths == [1, 2, 2, 2]  # what has not fitted once is not tried again
    with pytest.raises(torch.OutOfMemoryError):
        HalvingTrainer(Small(whole, room=0)).train(weights, schedules)


def test_one_local_step_is_the_gradient_itself(model: Model, data: ImageStore) -> None:
    weights = model.initial_weights().requires_grad_()
    images, labels = data.take(np.arange(6))
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.logits(weights, images), labels), weights)
    result = LoopTrainer(model, data, RATE).train(weights.detach(), [[np.arange(6)]])
    assert torch.allclose(result.updates[0], gradient, atol=1e-6)


def test_the_loop_gives_a_client_the_same_bits_whoever_is_beside_it(model: Model, data: ImageStore) -> None:
    weights = model.initial_weights()
    schedules = [[np.arange(8)], [np.arange(8, 16)]]
    both = LoopTrainer(model, data, RATE).train(weights, schedules).updates
    alone = LoopTrainer(model, data, RATE).train(weights, schedules[1:]).updates
    assert torch.equal(both[1], alone[0])


def test_channels_last_is_for_models_that_take_it_on_a_cpu() -> None:
    assert choose_memory_format(torch.device("cpu"), LeNetConfig.channels_last) == "channels_last"
    assert choose_memory_format(torch.device("cpu"), CustomModelConfig.channels_last) == "contiguous"
    assert choose_memory_format(torch.device("cuda"), LeNetConfig.channels_last) == "contiguous"


def test_bfloat16_is_near(model: Model, data: ImageStore) -> None:
    weights, schedules = model.initial_weights(), [[np.arange(16)]]
    exact = LoopTrainer(model, data, RATE).train(weights, schedules)
    rough = LoopTrainer(model, data, RATE, precision="bfloat16").train(weights, schedules)
    assert rough.updates.dtype == torch.float32
    assert 0 < (rough.updates - exact.updates).norm() < 0.02 * exact.updates.norm()


def test_batch_norm_is_the_same_channels_last() -> None:
    model = build_model(ConvNet64Config(), (3, 32, 32), 10, seed=0)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    data = ImageStore.of(images, np.arange(6), "cpu")
    weights, schedules = model.initial_weights(), [[np.arange(3), np.arange(3, 6)]]
    plain = LoopTrainer(model, data, RATE).train(weights, schedules)
    last = LoopTrainer(model, data, RATE, "channels_last").train(weights, schedules)
    assert torch.allclose(last.statistics, plain.statistics, rtol=1e-4, atol=1e-5)
    assert (last.updates - plain.updates).norm() < 1e-3 * plain.updates.norm()


@pytest.mark.parametrize(
    ("device", "batch", "fused_batch", "expected"),
    [
        ("cuda", 32, 16, "vectorized"),
        ("cpu", 2, 16, "vectorized"),
        ("cpu", 8, 0, "vectorized"),
        ("cpu", 8, 16, "fused"),
        ("cpu", 16, 16, "fused"),
        ("cpu", 17, 16, "loop"),
        ("cpu", 32, 0, "loop"),
    ],
)
def test_execution_depends_on_device_batch_and_model(
    device: str, batch: int, fused_batch: int, expected: str
) -> None:
    assert choose_execution(torch.device(device), batch, fused_batch) == expected


def test_epochs_visit_every_image_once_each() -> None:
    batches = local_batches(np.arange(10, 20), np.random.default_rng(0), 4, None, 2)
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    assert sorted(np.concatenate(batches[:3])) == list(range(10, 20))


def test_steps_reshuffle_when_the_data_has_run_out() -> None:
    batches = local_batches(np.arange(5), np.random.default_rng(0), 2, 7, 1)
    assert [len(b) for b in batches] == [2] * 7
    assert all(len(set(b)) == 2 for b in batches)


def test_a_client_with_few_images_uses_all() -> None:
    (batch,) = local_batches(np.arange(3), np.random.default_rng(0), 32, 1, 1)
    assert sorted(batch) == [0, 1, 2]
