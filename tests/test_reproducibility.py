"""The final weights are the same bits, whatever happens on the way."""

import errno
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from torch import Tensor

from fedsim.catalogue import members
from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.defenses import DefenseConfig
from fedsim.defenses.base import ClientContext, Defense
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.engine import pool
from fedsim.engine.checkpoints import CheckpointFolder
from fedsim.engine.federation import Federation
from fedsim.engine.runtime import Runtime
from fedsim.errors import RunError
from fedsim.learning.server_optimizers import ServerOptimizerConfig
from fedsim.progress import Reporter
from fedsim.results import SimulationResult
from fedsim.simulation import Simulation
from tests.conftest import other_workers, small_experiment

pytestmark = pytest.mark.ray

SERVERS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in members(ServerOptimizerConfig)},
    "momentum": {"name": "sgd", "momentum": 0.9},
}
DEFENSES = [name for name in members(DefenseConfig) if name != "custom"]
CASES = [*((name, "sgd") for name in DEFENSES), *(("graddefense", name) for name in SERVERS if name != "sgd")]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


def sha(result: SimulationResult) -> str:
    return str(result.summary["model_sha256"])


def experiment(defense: str, server: str = "sgd", **more: Any) -> ExperimentConfig:
    return small_experiment(defense={"name": defense}, federation={"server": SERVERS[server]}, **more)


@pytest.fixture(scope="module")
def reference(runtime: Runtime, digits: Dataset) -> dict[tuple[str, str], str]:
    """The final weights of each defense and server optimiser with two workers."""
    return {case: sha(Simulation(experiment(*case), runtime=runtime, dataset=digits).run()) for case in CASES}


def test_defenses_and_server_optimisers_change_the_weights(reference: dict[tuple[str, str], str]) -> None:
    assert len(set(reference.values())) == len(CASES)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_for_any_number_of_workers(
    count: int, runtime: Runtime, digits: Dataset, reference: dict[tuple[str, str], str]
) -> None:
    with other_workers(runtime, count):
        found = {case: sha(Simulation(experiment(*case), runtime=runtime, dataset=digits).run()) for case in CASES}
    assert found == reference


def dawdling(slow: int) -> Defense:
    """GradDefense in workers that take turns to be slow, a round each: first process `slow`, then the others."""
    defense = GradDefenseConfig().build()
    protect: Callable[[Tensor, ClientContext], Tensor] = defense.protect  # type: ignore[assignment]
    chunks = itertools.count()

    def slowly(updates: Tensor, context: ClientContext) -> Tensor:
        round_ = next(chunks) // 4  # each of two workers does half of eight
        time.sleep(0.1 * ((round_ % 2 == 0) == (os.getpid() == slow)))
        return protect(updates, context)

    defense.protect = slowly  # type: ignore[method-assign]
    return defense


@pytest.mark.parametrize("transport", ["wires", "calls"])
def test_for_chunks_that_end_in_any_order(
    transport: str,
    runtime: Runtime,
    digits: Dataset,
    reference: dict[tuple[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orders = []

    def noting_call(self: Any) -> Any:
        call = plain_next(self)
        if call and self.method == "run_chunks":
            orders.append(call.block.start)
        return call

    plain_next = pool._Dispatch._next
    monkeypatch.setattr(pool._Dispatch, "_next", noting_call)
    if transport == "calls":
        monkeypatch.setattr(runtime.pool, "wires", None)
    options = {"slow": ray.get(runtime.pool.workers[0].pid.remote())}
    config = small_experiment(defense={"name": "custom", "factory": f"{__name__}:dawdling", "options": options})
    result = Simulation(config, runtime=runtime, dataset=digits).run()
    assert result.summary["transport"] == transport
    assert sha(result) == reference["graddefense", "sgd"]
    width = len(orders) // 6
    rounds = [orders[at : at + width] for at in range(0, len(orders), width)]
    assert len(rounds) == 6 and len({tuple(order) for order in rounds}) > 1, rounds


class Stop(Reporter):
    """Interrupts after round 4 of 6."""

    def round(self, record: dict[str, Any]) -> None:
        if record["round"] == 4:
            raise KeyboardInterrupt


def interrupt(config: ExperimentConfig, runtime: Runtime, digits: Dataset, output: Path) -> None:
    """Run until `Stop` interrupts."""
    with pytest.raises(KeyboardInterrupt):
        Simulation(config, runtime=runtime, dataset=digits, output=output, reporter=Stop()).run()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_after_a_resume(
    case: tuple[str, str],
    runtime: Runtime,
    digits: Dataset,
    reference: dict[tuple[str, str], str],
    tmp_path: Path,
) -> None:
    interrupt(experiment(*case), runtime, digits, tmp_path / "run")
    resumed = Simulation(experiment(*case), runtime=runtime, dataset=digits, output=tmp_path / "run").run(True)
    assert sha(resumed) == reference[case]
    assert list(resumed.rounds["round"]) == list(range(6))


def test_after_an_interruption_in_an_evaluation(
    runtime: Runtime,
    digits: Dataset,
    reference: dict[tuple[str, str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rounds before it are kept, and the evaluation is made up for."""
    config = experiment("graddefense", checkpoint_every=100)

    def interrupted(self: Federation) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Federation, "evaluate", interrupted)
        Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run()
    kept = CheckpointFolder(tmp_path / "run/checkpoints", config.fingerprint()).latest()
    assert kept is not None and kept.rounds_done == 3
    resumed = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run(resume=True)
    assert sha(resumed) == reference["graddefense", "sgd"]
    assert resumed.rounds["ACC"].notna().tolist() == [False, False, True, False, False, True]


def test_a_resume_knows_what_happened_before_it(runtime: Runtime, digits: Dataset, tmp_path: Path) -> None:
    class Kill(Stop):
        def round(self, record: dict[str, Any]) -> None:
            if record["round"] == 1:
                os.kill(ray.get(runtime.server.pid.remote()), signal.SIGKILL)
            super().round(record)

    config, output = experiment("graddefense"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Simulation(config, runtime=runtime, dataset=digits, output=output, reporter=Kill()).run()
    first = Simulation(config, runtime=runtime, dataset=digits, output=output).run(resume=True).summary
    assert first["faults"]["server_restarts"] == 1
    (output / "result.json").unlink()
    again = Simulation(config, runtime=runtime, dataset=digits, output=output).run(resume=True).summary
    for name in ("faults", "transport", "model_sha256"):
        assert again[name] == first[name]
    assert again["transport"] == "wires"


def test_after_checkpoints_that_are_damaged_or_anothers(
    runtime: Runtime,
    digits: Dataset,
    reference: dict[tuple[str, str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = experiment("graddefense", checkpoint_every=1)
    interrupt(config, runtime, digits, tmp_path / "run")
    folder = CheckpointFolder(tmp_path / "run/checkpoints", config.fingerprint())
    sound, newest = sorted(folder.folder.iterdir())
    foreign = newest.with_name("round-000006.safetensors")
    foreign.write_bytes(newest.read_bytes().replace(config.fingerprint().encode(), b"0" * 64))
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run(resume=True)
    assert sha(resumed) == reference["graddefense", "sgd"]
    assert [foreign.name in line or newest.name in line for line in caplog.messages[:2]] == [True, True]
    assert "it belongs to another experiment" in caplog.text and sound.name not in caplog.text


def test_after_a_full_disk(
    runtime: Runtime,
    digits: Dataset,
    reference: dict[tuple[str, str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run stops with one line, the checkpoints before stay as they were, and no torn file lies about."""
    config = experiment("graddefense", checkpoint_every=1)
    full, flush = False, os.fsync

    class Fill(Reporter):
        def round(self, record: dict[str, Any]) -> None:
            nonlocal full
            full = record["round"] >= 2

    def fsync(file: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match="round-000004.safetensors: cannot be written: No space left on device"):
        Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run", reporter=Fill()).run()
    full = False
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"round-00000{n}.safetensors" for n in (2, 3)]
    resumed = Simulation(config, runtime=runtime, dataset=digits, output=tmp_path / "run").run(resume=True)
    assert sha(resumed) == reference["graddefense", "sgd"]


def test_after_workers_were_killed(
    runtime: Runtime, digits: Dataset, reference: dict[tuple[str, str], str]
) -> None:
    with other_workers(runtime, 2) as pool:
        victims = ray.get([worker.pid.remote() for worker in pool.workers])

        class Kill(Reporter):
            def round(self, record: dict[str, object]) -> None:
                if record["round"] in (1, 3):
                    os.kill(victims.pop(), signal.SIGKILL)

        config = experiment("graddefense")
        result = Simulation(config, runtime=runtime, dataset=digits, reporter=Kill()).run()
    assert sha(result) == reference["graddefense", "sgd"]
    assert result.summary["faults"]["workers_lost"] == 2
    assert (result.rounds["clients"] == 9).all()


def test_after_the_parameter_server_was_killed(
    runtime: Runtime, digits: Dataset, reference: dict[tuple[str, str], str]
) -> None:
    class Kill(Reporter):
        def round(self, record: dict[str, object]) -> None:
            if record["round"] == 2:
                os.kill(ray.get(runtime.server.pid.remote()), signal.SIGKILL)

    config = experiment("graddefense")
    result = Simulation(config, runtime=runtime, dataset=digits, reporter=Kill()).run()
    assert sha(result) == reference["graddefense", "sgd"]
    assert result.summary["faults"]["server_restarts"] >= 1
