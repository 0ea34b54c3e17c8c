import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.defenses.base import ClientContext, Defense
from fedsim.engine.federation import Federation
from fedsim.engine.pool import WorkerPool
from fedsim.engine.runtime import Runtime
from fedsim.engine.worker import ClientWorker
from fedsim.errors import ConfigError, RunError
from fedsim.learning.batches import ImageStore
from fedsim.progress import Reporter
from fedsim.results import SimulationResult
from fedsim.simulation import Simulation, prepare
from tests.conftest import small_experiment

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


def sha(result: SimulationResult) -> str:
    return str(result.summary["model_sha256"])


DEFENSES = [
    {"name": "none"},
    {"name": "graddefense", "sigma": 0.1},
    {"name": "gc", "prune": 0.5},
    {"name": "dp_gaussian", "sigma": 0.01},
    {"name": "dp_laplacian", "sigma": 0.01},
    {"name": "pld", "prune": 0.5},
]


def simulate(runtime: Runtime, digits: Dataset, name: str) -> SimulationResult:
    settings = next(defense for defense in DEFENSES if defense["name"] == name)
    return Simulation(small_experiment(defense=settings), runtime=runtime, dataset=digits).run()


@pytest.fixture(scope="module")
def reference(runtime: Runtime, digits: Dataset) -> dict[str, str]:
    """The final weights of each defense with two workers."""
    return {str(defense["name"]): sha(simulate(runtime, digits, str(defense["name"]))) for defense in DEFENSES}


def test_defenses_change_the_weights(reference: dict[str, str]) -> None:
    assert len(set(reference.values())) == len(DEFENSES)


@contextmanager
def other_workers(runtime: Runtime, count: int) -> Iterator[WorkerPool]:
    """Lend the runtime a pool of `count` fresh workers."""
    actor = ray.remote(ClientWorker).options(max_restarts=-1, max_task_retries=0, num_cpus=0)
    own, runtime.pool = runtime.pool, WorkerPool([actor.remote(sys.path) for _ in range(count)])
    try:
        yield runtime.pool
    finally:
        for worker in runtime.pool.workers:
            ray.kill(worker)
        runtime.pool = own


@pytest.mark.parametrize("count", [1, 3])
def test_the_final_weights_are_the_same_bits_for_any_number_of_workers(
    count: int, runtime: Runtime, digits: Dataset, reference: dict[str, str]
) -> None:
    with other_workers(runtime, count):
        found = {name: sha(simulate(runtime, digits, name)) for name in reference}
    assert found == reference


@pytest.mark.parametrize("server", [{"name": "sgd", "momentum": 0.9}, {"name": "adam"}, {"name": "yogi"}])
def test_a_resumed_run_ends_with_the_same_bits(
    server: dict[str, object], runtime: Runtime, digits: Dataset, tmp_path: Path
) -> None:
    config = small_experiment(federation={"server": server}, defense={"name": "graddefense", "sigma": 0.1})
    whole = Simulation(config, runtime=runtime, dataset=digits).run()

    class Stop(Reporter):
        def round(self, record: dict[str, object]) -> None:
            if record["round"] == 4:
                raise KeyboardInterrupt

    broken = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run", reporter=Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run(resume=True)
    assert sha(resumed) == sha(whole)
    assert list(resumed.rounds["loss"]) == list(whole.rounds["loss"])


def test_a_finished_run_is_read_back_not_run_again(runtime: Runtime, digits: Dataset, tmp_path: Path) -> None:
    config = small_experiment()
    first = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run()
    again = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run(resume=True)
    assert again.summary == first.summary


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


def test_killed_workers_cost_no_client_and_no_bit(
    runtime: Runtime, digits: Dataset, reference: dict[str, str]
) -> None:
    with other_workers(runtime, 2) as pool:
        victims = ray.get([worker.pid.remote() for worker in pool.workers])

        class Kill(Reporter):
            def round(self, record: dict[str, object]) -> None:
                if record["round"] in (1, 3):
                    os.kill(victims.pop(), signal.SIGKILL)

        config = small_experiment(defense=DEFENSES[1])
        result = Simulation(config, runtime=runtime, dataset=digits, reporter=Kill()).run()
    assert sha(result) == reference["graddefense"]
    assert result.summary["faults"]["workers_lost"] == 2
    assert (result.rounds["clients"] == 9).all()


def test_a_killed_parameter_server_is_restored_from_its_last_round(
    runtime: Runtime, digits: Dataset, reference: dict[str, str]
) -> None:
    class Kill(Reporter):
        def round(self, record: dict[str, object]) -> None:
            if record["round"] == 2:
                os.kill(ray.get(runtime.server.pid.remote()), signal.SIGKILL)

    config = small_experiment(defense=DEFENSES[1])
    result = Simulation(config, runtime=runtime, dataset=digits, reporter=Kill()).run()
    assert sha(result) == reference["graddefense"]
    assert result.summary["faults"]["server_restarts"] >= 1


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
    """Spoils the update of the client that trains alone in the last chunk."""

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        return updates * float("nan") if len(updates) == 1 else updates


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


def test_a_private_runtime_leaves_no_process_and_no_file(digits: Dataset) -> None:
    """Run apart, in a process of its own, because this one holds the shared runtime."""
    code = (
        "import tempfile, fedsim.simulation as s; from tests.conftest import small_experiment as e;"
        "print(s.Simulation(e(federation={'rounds': 1})).run().accuracy)"
    )
    before = {path.name for path in Path(tempfile.gettempdir()).glob("fedsim-*")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 <= float(done.stdout.split()[-1]) <= 1
    after = {path.name for path in Path(tempfile.gettempdir()).glob("fedsim-*")}
    assert after == before


def test_several_local_steps_are_attacked_through_the_clients_training(runtime: Runtime, digits: Dataset) -> None:
    """The loss of the truth is zero only if the simulated training is the clients' own."""
    config = small_experiment(
        federation={"rounds": 1, "local_steps": 2, "batch_size": 2},
        attacks=[{"name": "gia", "iterations": 3}],
        audit={"payload": "training", "victims": 2},
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
