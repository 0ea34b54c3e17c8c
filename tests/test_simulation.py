import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.defenses.base import ClientContext, Defense
from fedsim.engine.federation import Federation
from fedsim.engine.runtime import Runtime
from fedsim.errors import ConfigError, RunError
from fedsim.learning.batches import ImageStore
from fedsim.preparation import prepare
from fedsim.simulation import Simulation
from fedsim.tracking import Tracker
from tests.conftest import small_experiment

pytestmark = pytest.mark.ray


def test_what_only_a_runs_end_needs_is_not_imported_at_its_start() -> None:
    late = ("matplotlib", "mlflow", "pandas", "scipy", "skimage", "sklearn", "ray.tune", "torch._dynamo")
    code = f"import sys, fedsim.plan, fedsim.simulation; print([m for m in {late} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


def test_a_finished_run_is_read_back_not_run_again(runtime: Runtime, digits: Dataset, tmp_path: Path) -> None:
    config = small_experiment()
    first = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run()
    again = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run(resume=True)
    assert again.summary == first.summary


def test_a_run_tells_how_its_clients_were_trained(runtime: Runtime, digits: Dataset) -> None:
    for batch, execution in {2: "vectorized", 3: "fused", 64: "fused", 65: "loop"}.items():
        config = small_experiment(federation={"rounds": 1, "batch_size": batch})
        assert Simulation(config, runtime=runtime, dataset=digits).run().summary["execution"] == execution
    config = small_experiment(federation={"rounds": 1, "batch_size": 1}, runtime={"execution": "loop"})
    assert Simulation(config, runtime=runtime, dataset=digits).run().summary["execution"] == "loop"


def test_a_model_that_cannot_be_fused_is_refused_before_anything_starts(digits: Dataset) -> None:
    layers = {"name": "custom", "factory": "tests.test_simulation:scaled"}
    with pytest.raises(ConfigError, match="fused needs linear layers and plain convolutions, not 1.scale"):
        Simulation(small_experiment(model=layers, runtime={"execution": "fused"}), dataset=digits)


class Scaled(nn.Module):
    """A layer with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def scaled(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Scaled(), nn.Linear(int(np.prod(shape)), classes))


def test_an_occupied_folder_is_refused(runtime: Runtime, digits: Dataset, tmp_path: Path) -> None:
    Simulation(small_experiment(), runtime=runtime, dataset=digits, output=tmp_path / "run").run()
    with pytest.raises(ConfigError, match="--resume"):
        Simulation(small_experiment(), runtime=runtime, dataset=digits, output=tmp_path / "run").run()
    with pytest.raises(ConfigError, match="another experiment"):
        Simulation(small_experiment(seed=1), runtime=runtime, dataset=digits, output=tmp_path / "run").run(True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        Simulation(small_experiment(), runtime=runtime, dataset=digits, output=tmp_path / "other").run()


def test_updates_that_are_not_finite_are_left_out_and_counted(runtime: Runtime, digits: Dataset) -> None:
    config = small_experiment(
        defense={"name": "custom", "factory": "tests.test_simulation:Poison"}, federation={"rounds": 2}
    )
    result = Simulation(config, runtime=runtime, dataset=digits).run()
    assert list(result.rounds["clients_rejected"]) == [1, 1]
    assert list(result.rounds["clients"]) == [8, 8]
    assert np.isfinite(result.rounds["loss"]).all()


def test_too_few_usable_updates_end_the_run_with_a_clear_line(runtime: Runtime, digits: Dataset) -> None:
    config = small_experiment(
        defense={"name": "custom", "factory": "tests.test_simulation:Poison"}, federation={"min_clients": 9}
    )
    with pytest.raises(RunError, match="8 of 9 clients"):
        Simulation(config, runtime=runtime, dataset=digits).run()


class Poison(Defense):
    """Spoils one update of the only chunk with two clients."""

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        spoilt = updates.clone()
        spoilt[1:] = float("nan")
        return spoilt


def test_one_round_is_plain_federated_averaging(runtime: Runtime, digits: Dataset) -> None:
    """The engine against ten lines: gradients of the cohort's batches, averaged by examples."""
    config = small_experiment(federation={"rounds": 1, "learning_rate": 0.3})
    spec = prepare(config, digits).spec
    model = spec.build_model(digits)
    data = ImageStore.of(digits.train_images, digits.train_labels, "cpu")
    weights, total, examples = model.initial_weights(), torch.zeros(model.layout.dimension), 0
    for client in spec.cohort(0):
        (batch,) = spec.schedule(0, client)
        images, labels = data.take(batch)
        gradient = torch.func.grad(lambda w, x, y: F.cross_entropy(model.logits(w, x), y))(weights, images, labels)
        total, examples = total + len(batch) * gradient, examples + len(batch)
    federation = Federation(spec, digits, runtime)
    federation.run_round(0)
    assert np.allclose(federation.weights(), weights - 0.3 * total / examples, atol=1e-6)
    federation.close()


def test_a_training_payload_is_the_very_update(runtime: Runtime, digits: Dataset) -> None:
    config = small_experiment(
        defense={"name": "dp_gaussian", "sigma": 0.5},
        audit={"payload": "training", "victims": 9},
        attacks=[{"name": "gia", "iterations": 1}],
        federation={"learning_rate": 0.25},
    )
    prepared = prepare(config, digits)
    federation = Federation(prepared.spec, digits, runtime)
    before = federation.weights()
    seen = federation.probe(0, prepared.victims[0]).gradients
    sizes = np.array([len(victim.images) for victim in prepared.victims[0]])
    federation.run_round(0)
    expected = before - 0.25 * (sizes / sizes.sum()) @ seen
    assert np.allclose(federation.weights(), expected, atol=1e-5)
    federation.close()


@pytest.mark.parametrize("rate", ["known", "estimated"])
def test_several_local_steps_are_attacked_through_the_clients_training(
    rate: str, runtime: Runtime, digits: Dataset
) -> None:
    """The loss of the truth is zero only if the simulated training is the clients' own."""
    config = small_experiment(
        federation={"rounds": 1, "local_steps": 2, "batch_size": 2},
        attacks=[{"name": "gia", "iterations": 3}],
        audit={"payload": "training", "victims": 2, "local_learning_rate": rate},
    )
    result = Simulation(config, dataset=digits, runtime=runtime).run()
    assert len(result.images) == 8
    assert result.images["loss_at_truth"].max() < 1e-6 < result.images["loss"].min()


def test_local_training_that_repeats_images_cannot_be_audited(digits: Dataset) -> None:
    config = small_experiment(
        federation={"local_steps": 50, "batch_size": 16},
        attacks=[{"name": "dlg"}],
        audit={"payload": "training"},
    )
    with pytest.raises(ConfigError, match="use each image once"):
        prepare(config, digits)


def test_overhead_is_measured_in_rounds_that_have_their_quorum(runtime: Runtime, digits: Dataset) -> None:
    config = small_experiment(
        defense={"name": "gc"},
        overhead_pairs=3,
        federation={"rounds": 1, "clients_per_round": 8, "min_clients": 7, "dropout": 0.2},
    )
    seeds = (config.model_copy(update={"seed": seed}) for seed in range(1000))
    cohorts = ((seed, [len(prepare(seed, digits).spec.cohort(number)) for number in range(6)]) for seed in seeds)
    unlucky = next(config for config, sizes in cohorts if sizes[0] >= 7 and min(sizes[2:6]) < 7)
    assert Simulation(unlucky, runtime=runtime, dataset=digits).run().summary["overhead"]["pairs"] == 3


def test_the_first_error_is_told_whatever_mlflow_says(
    runtime: Runtime,
    digits: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(self: Federation) -> None:
        monkeypatch.setattr("mlflow.MlflowClient.log_batch", gone)
        raise ValueError("the first error")

    def gone(*arguments: object, **options: object) -> None:
        raise OSError("the store is gone")

    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "errors", tmp_path / "artifacts")
    monkeypatch.setattr(Federation, "evaluate", fail)
    monkeypatch.setattr("fedsim.simulation.LAST_WORDS_SECONDS", 0)
    with pytest.raises(ValueError, match="the first error"):
        Simulation(small_experiment(), runtime=runtime, dataset=digits, tracker=tracker).run()
    assert "the run's end is not in MLflow: MLflow: the store is gone" in caplog.text
