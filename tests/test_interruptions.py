"""Commands that are killed, interrupted or fail: what they had is kept, and no process or file is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.engine.checkpoints import CheckpointFolder
from fedsim.engine.runtime import Runtime
from fedsim.simulation import Simulation
from tests.conftest import small_experiment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

PATIENCE = 500
"""Seconds that a process has on a busy machine."""


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@dataclass
class Sandbox:
    """A folder with all temporary files of the commands started in it; their processes are known by its name."""

    path: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fsi")))  # short: sockets lie there
    started: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def start(self, *settings: str, resume: bool = False) -> "subprocess.Popen[str]":
        """Run a simulation as a user does."""
        command = [sys.executable, "-m", "fedsim", "run", *settings, "--output", str(self.path / "out")]
        return self.launch(command + ["--resume"] * resume)

    def launch(self, command: list[str]) -> "subprocess.Popen[str]":
        """Start a command in a process group of its own that heeds Ctrl-C."""
        (self.path / "tmp").mkdir(exist_ok=True)
        process = subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(self.path / "tmp"), "PYTHONPATH": os.getcwd()},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """All processes, however they came to be, that were started from here and still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == str(self.path / "tmp"):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def expect_nothing_left(self) -> None:
        wait_for(lambda: not self.processes())
        # PyTorch keeps a cache there for all its users.
        assert not [path for path in (self.path / "tmp").iterdir() if not path.name.startswith("torchinductor_")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    for process in [*sandbox.started, *sandbox.processes()]:
        try:
            process.kill()
        except (psutil.Error, ProcessLookupError):
            pass
    shutil.rmtree(sandbox.path, ignore_errors=True)


SETTINGS: dict[str, Any] = {
    "federation": {"rounds": 150, "clients": 20, "clients_per_round": 9, "server": {"name": "adam"}},
    "defense": {"name": "graddefense", "sigma": 0.1},
    "checkpoint_every": 3,
}


def experiment(**federation: Any) -> ExperimentConfig:
    return small_experiment(**{**SETTINGS, "federation": {**SETTINGS["federation"], **federation}})


def arguments(config: ExperimentConfig) -> list[str]:
    """The whole config as a command line gives it."""
    data = {**config.to_dict(), "tracking": {"uri": "off"}}
    return [f"{name}={json.dumps(value)}" for name, value in data.items()]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


def test_a_driver_killed_again_and_again_ends_with_the_same_weights(
    sandbox: Sandbox, runtime: Runtime, digits: Dataset
) -> None:
    """Killed while the workers start, after the first checkpoint, and once more further on."""
    whole = Simulation(experiment(), dataset=digits, runtime=runtime).run()
    assert whole.summary["transport"] == "wires"
    folder = sandbox.path / "out/small"
    (sandbox.path / "tmp").mkdir()

    def rounds() -> int:
        return max((int(path.stem[6:]) for path in folder.glob("checkpoints/round-*")), default=0)

    seen: list[int] = []
    for moment in (lambda: (folder / "config.yaml").exists(), lambda: rounds() >= 3, lambda: rounds() >= 60):
        process = sandbox.start(*arguments(experiment()), resume=bool(seen))
        wait_for(lambda: moment() or process.poll() is not None)  # noqa: B023
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()[0]
        seen.append(rounds())
    last = sandbox.start(*arguments(experiment()), resume=True)
    output, _ = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, output
    assert f"{seen[-1]} of them done before" in output and seen[0] < 3 <= seen[1] < 60 <= seen[2]
    assert json.loads((folder / "result.json").read_text())["model_sha256"] == whole.summary["model_sha256"]
    # No resume waits for what a killed driver leaves: Ray gives a worker that was starting half a minute.
    wait_for(lambda: not sandbox.processes())


def test_a_private_runtime_leaves_no_process_and_no_file(sandbox: Sandbox) -> None:
    """Run apart, in a process of its own, because this one holds the shared runtime."""
    code = (
        "import signal, fedsim.simulation as s; from tests.conftest import small_experiment as e;"
        "before = signal.getsignal(signal.SIGTERM);"
        "print(s.Simulation(e(federation={'rounds': 1})).run().accuracy);"
        "assert signal.getsignal(signal.SIGTERM) == before"
    )
    process = sandbox.launch([sys.executable, "-c", code])
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert 0 <= float(output.split()[-1]) <= 1
    sandbox.expect_nothing_left()


def test_nothing_is_left_after_success(sandbox: Sandbox) -> None:
    process = sandbox.start(*arguments(experiment(rounds=2)))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    sandbox.expect_nothing_left()


def test_nothing_is_left_after_a_failure(sandbox: Sandbox) -> None:
    process = sandbox.start(*arguments(experiment(min_clients=8, dropout=0.1)))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, output
    line = output.strip().splitlines()[-1]
    assert line.startswith("fedsim run: round ") and "dropped out" in line
    sandbox.expect_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_run_keeps_its_rounds_and_leaves_nothing(sandbox: Sandbox, number: signal.Signals) -> None:
    """Ctrl-C reaches every process of the terminal's group, Ray's among them; a batch system's SIGTERM one."""
    config = experiment(rounds=100_000)
    process = sandbox.start(*arguments(config))
    checkpoints = sandbox.path / "out/small/checkpoints"
    wait_for(lambda: list(checkpoints.glob("round-*")) or process.poll() is not None)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert output.strip().splitlines()[-1].startswith("fedsim run: interrupted")
    kept = CheckpointFolder(checkpoints, config.fingerprint()).latest()
    assert kept is not None and kept.rounds_done == len(kept.history) >= 3
    sandbox.expect_nothing_left()
