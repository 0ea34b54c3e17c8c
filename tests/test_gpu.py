"""What only a GPU can show; `python -m pytest -m gpu` on a machine that has one."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from fedsim.attacks.base import AttackSettings
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.gia import GIAConfig
from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.engine.federation import Federation
from fedsim.engine.runtime import Runtime
from fedsim.learning.batches import ImageStore
from fedsim.learning.execution import HalvingTrainer, build_trainer
from fedsim.learning.models import LeNetConfig, build_model
from fedsim.preparation import prepare
from fedsim.replay import Replayed
from tests.attacks.problems import observe, smooth_images
from tests.conftest import small_experiment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RATE = 0.1


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


@pytest.fixture(autouse=True)
def whole_mantissa() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize(("execution", "steps"), [("loop", 1), ("vectorized", 1), ("fused", 1), ("vectorized", 3)])
def test_updates_are_those_of_a_cpu(execution: Any, steps: int, digits: Dataset) -> None:
    """Also from the fourth chunk on, which is a graph's."""
    found = {}
    rng = np.random.default_rng(0)
    rounds = [[[rng.choice(1400, 8, replace=False) for _ in range(steps)] for _ in range(5)] for _ in range(6)]
    for device in ("cpu", "cuda"):
        model = build_model(LeNetConfig(init="uniform"), digits.shape, 10, seed=0).to(device)
        data = ImageStore.of(digits.train_images, digits.train_labels, device)
        trainer = build_trainer(model, data, RATE, execution if device == "cuda" else "loop")
        weights = model.initial_weights().to(device)
        for number, schedules in enumerate(rounds):
            result = trainer.train(weights * (1 + 0.1 * number), schedules)
            found[device, number] = result.updates.cpu(), result.losses.cpu()
    for number in range(len(rounds)):
        for mine, other in zip(found["cuda", number], found["cpu", number], strict=True):
            assert torch.allclose(mine, other, atol=2e-5, rtol=1e-4)


def final_weights(digits: Dataset, workers: int, kill: bool = False, **settings: Any) -> np.ndarray:
    runtime_settings = {"workers": workers, "deterministic": True, "clients_per_chunk": 2}
    config = small_experiment(runtime=runtime_settings, **settings)
    with Runtime(config.runtime) as runtime:
        federation = Federation(prepare(config, digits).spec, digits, runtime)
        for round_ in range(config.federation.rounds):
            if kill and round_ == 2:
                os.kill(ray.get(runtime.pool.workers[0].pid.remote()), signal.SIGKILL)
            federation.run_round(round_)
        assert (federation.faults.workers_lost > 0) == kill
        return federation.weights()


@pytest.mark.ray
@pytest.mark.parametrize("defense", ["none", "graddefense", "gc", "dp_gaussian", "pld"])
def test_the_weights_are_the_same_bits_for_any_number_of_workers(defense: str, digits: Dataset) -> None:
    settings = {"defense": {"name": defense}}
    one, three = (final_weights(digits, workers, **settings) for workers in (1, 3))
    assert np.array_equal(one, three)


@pytest.mark.ray
def test_a_killed_worker_changes_no_bit(digits: Dataset) -> None:
    undisturbed, killed = final_weights(digits, 2), final_weights(digits, 2, kill=True)
    assert np.array_equal(undisturbed, killed)


@pytest.mark.parametrize("settings", [DLGConfig(iterations=300), GIAConfig(iterations=400)])
def test_attacks_find_on_a_gpu_what_they_find_on_a_cpu(settings: AttackSettings) -> None:
    model = build_model(LeNetConfig(), (1, 28, 28), 10, seed=0)
    truth = smooth_images(3, (1, 28, 28))[:, None]
    observation = observe(model, truth, torch.tensor([[3], [1], [4]]), know_labels=True)
    on_gpu = replace(
        observation,
        model=observation.model.to("cuda"),
        weights=observation.weights.cuda(),
        gradients=observation.gradients.cuda(),
        statistics=observation.statistics.cuda(),
        labels=torch.tensor([[3], [1], [4]], device="cuda"),
    )
    found = settings.build().reconstruct(on_gpu).cpu()
    error = (found.images - truth).square().flatten(1).mean(1)
    assert (error < 1e-3).all(), error


def test_a_chunk_that_does_not_fit_is_trained_in_parts(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(LeNetConfig(init="uniform"), digits.shape, 10, seed=0).to("cuda")
    data = ImageStore.of(digits.train_images, digits.train_labels, "cuda")
    trainer, weights = build_trainer(model, data, RATE, "vectorized"), model.initial_weights().cuda()
    assert isinstance(trainer, HalvingTrainer)
    widths, train = list[int](), trainer.trainer.train
    monkeypatch.setattr(trainer.trainer, "train", lambda w, part: (widths.append(len(part)), train(w, part))[1])
    schedules = [[np.arange(32) + client] for client in range(256)]
    torch.cuda.reset_peak_memory_stats()
    whole = trainer.train(weights, schedules).updates
    needed, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    try:
        parts = trainer.train(weights, schedules).updates
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert widths[:2] == [256, 256] and widths[2] == 128, "it fits at first, and then it does not"
    assert torch.allclose(whole, parts, atol=1e-5)


def test_a_replayed_function_gives_what_the_function_gives() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a @ b, (a * b).sum(1)

    replayed = Replayed(function)
    for seed in range(8):
        generator = torch.Generator("cuda").manual_seed(seed)
        size = 16 if seed < 6 else 8
        a, b = (torch.rand(size, size, generator=generator, device="cuda") for _ in range(2))
        for mine, expected in zip(replayed(a, b), function(a, b), strict=True):
            assert torch.allclose(mine, expected, atol=1e-6)


def test_a_function_that_waits_for_the_gpu_is_called_as_it_is() -> None:
    replayed = Replayed(lambda a: (a * float(a.sum()),))
    for seed in range(8):
        a = torch.full((4,), float(seed), device="cuda")
        assert torch.equal(replayed(a)[0], a * 4 * seed)
