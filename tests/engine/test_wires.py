"""Rounds that wires carry: the bits of those that calls carry, whatever dies meanwhile."""

import contextlib
import errno
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError
from torch import Tensor

from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.defenses.base import ClientContext, Defense, ServerContext
from fedsim.engine import federation as federation_module
from fedsim.engine import wires as wires_module
from fedsim.engine.chunks import ChunkTask
from fedsim.engine.dealing import MOST, Dealer
from fedsim.engine.federation import Federation
from fedsim.engine.pool import Faults, WorkerPool
from fedsim.engine.runtime import Runtime
from fedsim.engine.wires import MOST_CLIENTS, MOST_PARAMETERS, Answering, Wires
from fedsim.errors import RunError
from fedsim.preparation import prepare
from tests.conftest import other_workers, small_experiment

ROUNDS = 6
STATEFUL: dict[str, Any] = {"server": {"name": "adam"}}
NORMED = {"name": "custom", "factory": "tests.engine.test_chunks:normed"}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


@pytest.fixture
def own(runtime: Runtime, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """The tests' runtime with workers and wires of its own."""
    with other_workers(runtime, getattr(request, "param", 2)) as pool:
        pool.wires = Wires(pool.workers, runtime.server)
        yield runtime
        pool.wires.close()


def run(
    config: ExperimentConfig, digits: Dataset, runtime: Runtime, before: Callable[[int], Any] = int
) -> Federation:
    """Run all rounds, with `before` called before each; the federation is closed but knows how it went."""
    federation = Federation(prepare(config, digits).spec, digits, runtime)
    records = []
    for number in range(config.federation.rounds):
        before(number)
        records.append(federation.run_round(number))
    federation.close()
    assert [record.clients for record in records] == [config.federation.clients_per_round] * len(records)
    return federation


def by_calls(config: ExperimentConfig, digits: Dataset, runtime: Runtime) -> np.ndarray[Any, Any]:
    wires, runtime.pool.wires = runtime.pool.wires, None
    federation = run(config, digits, runtime)
    runtime.pool.wires = wires
    assert not federation.rounds_by_wire
    return federation.weights()


@pytest.mark.ray
@pytest.mark.parametrize("own", [1, 2, 3], indirect=True)
def test_the_bits_are_those_of_calls(own: Runtime, digits: Dataset) -> None:
    """For defenses that publish, that compensate and that keep memory, and a model with batch norm."""
    experiments = [
        small_experiment(defense={"name": "graddefense"}, federation=STATEFUL),
        small_experiment(defense={"name": "gc"}, federation={"server": {"name": "sgd", "momentum": 0.9}}),
        small_experiment(defense={"name": "pld"}, federation={"rounds": 2}),
        small_experiment(model=NORMED, federation={"rounds": 3, "local_steps": 2}),
    ]
    for config in experiments:
        federation = run(config, digits, own)
        assert federation.rounds_by_wire == config.federation.rounds
        assert np.array_equal(federation.weights(), by_calls(config, digits, own))


class Deadly(Defense):
    """Kills the process that it is in when a file asks for it, once."""

    refresh_rounds = 1

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        self._die("worker")
        return updates

    def compensate(self, aggregate: Tensor, context: ServerContext) -> Tensor:
        self._die("server")
        return aggregate

    def _die(self, who: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / who).unlink()  # only one process can
            os.kill(os.getpid(), signal.SIGKILL)


def deadly(folder: Path, **settings: Any) -> ExperimentConfig:
    defense = {"name": "custom", "factory": f"{__name__}:Deadly", "options": {"folder": str(folder)}}
    return small_experiment(defense=defense, federation={**STATEFUL, **settings})


@pytest.mark.ray
def test_a_server_that_dies_is_asked_again_and_no_client_works_twice(
    own: Runtime, digits: Dataset, tmp_path: Path
) -> None:
    config = deadly(tmp_path)
    federation = run(config, digits, own, lambda number: number == 2 and (tmp_path / "server").touch())
    assert not (tmp_path / "server").exists(), "it did not die"
    assert federation.faults == Faults(server_restarts=1)
    assert federation.rounds_by_wire == ROUNDS
    assert np.array_equal(federation.weights(), by_calls(config, digits, own))


def wait_for_all(runtime: Runtime) -> None:
    """Until those that died are back."""
    left = [*runtime.pool.workers, runtime.server]
    while left:
        with contextlib.suppress(RayActorError):
            ray.get(left[-1].pid.remote())
            left.pop()
    runtime.pool.recovering.clear()


@pytest.mark.ray
def test_what_a_worker_had_that_dies_is_done_by_another(own: Runtime, digits: Dataset, tmp_path: Path) -> None:
    config = deadly(tmp_path)

    def kill(number: int) -> None:
        if number in (0, 3):
            wait_for_all(own)
            (tmp_path / "worker").touch()

    federation = run(config, digits, own, kill)
    assert federation.faults == Faults(workers_lost=2, chunks_retried=2 * 4), "two workers have four chunks each"
    assert federation.rounds_by_wire == ROUNDS
    assert np.array_equal(federation.weights(), by_calls(config, digits, own))


@pytest.mark.ray
@pytest.mark.parametrize("own", [1], indirect=True)
def test_a_worker_that_comes_back_in_the_round_goes_on_by_wire(
    own: Runtime, digits: Dataset, tmp_path: Path
) -> None:
    """There is no other."""
    config = deadly(tmp_path)
    federation = run(config, digits, own, lambda number: number == 1 and (tmp_path / "worker").touch())
    assert federation.faults == Faults(workers_lost=1, chunks_retried=8)
    assert federation.rounds_by_wire == ROUNDS
    assert np.array_equal(federation.weights(), by_calls(config, digits, own))


@pytest.mark.ray
def test_processes_that_die_between_rounds_cost_no_client(own: Runtime, digits: Dataset) -> None:
    config = small_experiment(defense={"name": "graddefense"}, federation=STATEFUL)
    actors = {1: own.pool.workers[0], 3: own.server}

    def kill(number: int) -> None:
        if number in actors:
            os.kill(ray.get(actors[number].pid.remote()), signal.SIGKILL)

    federation = run(config, digits, own, kill)
    assert federation.faults.workers_lost == 1
    assert federation.faults.server_restarts == 1
    assert np.array_equal(federation.weights(), by_calls(config, digits, own))


@pytest.mark.ray
def test_a_new_server_is_told_what_the_old_one_knew(own: Runtime, digits: Dataset) -> None:
    """The driver had hung up, so it does not see that there is another process now."""
    config = small_experiment(federation=STATEFUL)
    old = ray.get(own.server.pid.remote())

    def replace(number: int) -> None:
        if number == 2:
            assert own.pool.wires is not None
            own.pool.wires.close()
            os.kill(old, signal.SIGKILL)
            wait_for_all(own)
            assert ray.get(own.server.pid.remote()) != old

    federation = run(config, digits, own, replace)
    assert federation.faults.server_restarts == 1
    assert federation.rounds_by_wire == ROUNDS
    assert np.array_equal(federation.weights(), by_calls(config, digits, own))


class OddError(Exception):
    """Cannot be read back from its pickle."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what} {number}")


class Failing(Defense):
    """Clients send what is not finite, or the code has a bug."""

    def __init__(self, bug: str) -> None:
        self.bug = bug

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        if self.bug == "plain":
            raise ZeroDivisionError("a bug")
        if self.bug == "odd":
            raise OddError("bug", 2)
        return updates * float("nan")


def failing(bug: str) -> ExperimentConfig:
    factory = {"factory": f"{__name__}:Failing", "options": {"bug": bug}}
    return small_experiment(defense={"name": "custom", **factory})


@pytest.mark.ray
def test_errors_are_those_of_calls_and_the_wires_outlive_them(own: Runtime, digits: Dataset) -> None:
    with pytest.raises(RunError, match=r"round 0: 0 of 9 clients sent a usable update, .*9 sent what is not"):
        run(failing(""), digits, own)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        run(failing("plain"), digits, own)
    assert "in protect" in caught.value.__notes__[0], "where it was raised"
    with pytest.raises(RuntimeError, match="OddError: bug 2"):
        run(failing("odd"), digits, own)
    assert run(small_experiment(), digits, own).rounds_by_wire == ROUNDS
    assert own.pool.faults.workers_lost == 0


class Slow(Defense):
    """A chunk takes a while."""

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        time.sleep(0.2)
        return updates


@pytest.mark.ray
def test_an_interruption_leaves_no_answer_to_be_taken_for_the_next_one(own: Runtime, digits: Dataset) -> None:
    """Ctrl-C while a round is under way."""
    config = small_experiment(defense={"name": "custom", "factory": f"{__name__}:Slow"})
    ctrl_c = Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(config, digits, own, lambda number: number == 1 and ctrl_c.start())
    finally:
        signal.signal(signal.SIGINT, before)
    config = small_experiment()
    federation = run(config, digits, own)
    assert federation.rounds_by_wire == ROUNDS
    assert np.array_equal(federation.weights(), by_calls(config, digits, own))


@pytest.mark.ray
def test_messages_larger_than_a_sockets_buffer_get_through(own: Runtime, digits: Dataset) -> None:
    """A worker sends the sum of its last block while the driver sends it the next one's."""
    inputs = digits.train_images[0].size
    wide = {"name": "mlp", "hidden": [(MOST_PARAMETERS - 10) // (inputs + 11)]}
    config = small_experiment(model=wide, runtime={"clients_per_chunk": 1})
    federation = run(config, digits, own)
    assert federation.rounds_by_wire == ROUNDS
    assert 0.98 < len(federation.weights()) / MOST_PARAMETERS <= 1
    assert np.array_equal(federation.weights(), by_calls(config, digits, own))


def test_a_message_that_may_have_to_wait_fits_into_any_sockets_buffer() -> None:
    clients = tuple(range(10**6, 10**6 + MOST_CLIENTS))
    block = [ChunkTask(10**6, tuple(client + at for client in clients)) for at in range(MOST)]
    assert len(pickle.dumps(("run_chunks", (tuple(block), 10**6)))) < 8192


@pytest.mark.ray
def test_large_models_and_chunks_go_by_calls(
    own: Runtime, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_experiment(federation={"rounds": 1})
    size = len(run(config, digits, own).weights())
    for most, by_wire in ((size, 1), (size - 1, 0)):
        monkeypatch.setattr(federation_module, "MOST_PARAMETERS", most)
        assert run(config, digits, own).rounds_by_wire == by_wire
    monkeypatch.undo()
    monkeypatch.setattr(federation_module, "MOST_CLIENTS", 1)
    assert run(config, digits, own).rounds_by_wire == 0


@pytest.mark.ray
def test_where_sockets_do_not_work_rounds_go_by_calls(
    own: Runtime,
    digits: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    deep = tmp_path / ("long" * 50)  # a socket's path has a hundred letters at most
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    assert run(small_experiment(federation={"rounds": 2}), digits, own).rounds_by_wire == 0
    (line,) = caplog.messages
    assert "sockets do not work here" in line and "\n" not in line


@pytest.mark.ray
@pytest.mark.parametrize("own", [1], indirect=True)
@pytest.mark.parametrize("victim", ["worker", "server"])
def test_where_sockets_stop_working_the_round_goes_on_by_calls(
    victim: str,
    own: Runtime,
    digits: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A full disk, for one: who dies cannot be connected again, but it lives, and no chunk is to blame."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def before(number: int) -> None:
        if number == 2:
            (tmp_path / victim).touch()
            monkeypatch.setattr(wires_module, "Scratch", full)

    config = deadly(tmp_path)
    federation = run(config, digits, own, before)
    assert federation.faults.workers_lost == (victim == "worker")
    assert federation.faults.server_restarts == (victim == "server")
    # The server's death comes at a round's end, which is all that calls do of that round.
    assert federation.rounds_by_wire == 2 + (victim == "server")
    assert sum("sockets do not work here" in line for line in caplog.messages) == 1
    assert np.array_equal(federation.weights(), by_calls(config, digits, own))


@pytest.mark.ray
@pytest.mark.parametrize("own", [1], indirect=True)
def test_a_death_that_calls_find_is_counted_once(own: Runtime, digits: Dataset) -> None:
    config = small_experiment()
    federation = Federation(prepare(config, digits).spec, digits, own)
    federation.run_round(0)
    os.kill(ray.get(own.pool.workers[0].pid.remote()), signal.SIGKILL)
    federation.evaluate()
    federation.run_round(1)
    federation.close()
    assert federation.rounds_by_wire == 2
    assert federation.faults.workers_lost == 1


@pytest.mark.ray
def test_a_process_that_dies_while_it_is_connected_is_done_without(
    own: Runtime, digits: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Of the first worker's second try, which comes with its first message, and of all at first.
    errors: list[Exception] = [EOFError(), EOFError(), EOFError(), ConnectionRefusedError()]
    connect = wires_module.Client

    def refusing(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return connect(*arguments, **options)

    monkeypatch.setattr(wires_module, "Client", refusing)
    federation = run(small_experiment(), digits, own)
    assert federation.rounds_by_wire == ROUNDS
    assert federation.faults.workers_lost == 1
    assert not caplog.messages


class Echo(Answering):
    """Answers what it was told."""

    def echo(self, number: int) -> int:
        return number


@pytest.mark.ray
def test_an_error_of_the_drivers_own_leaves_no_answers_behind(runtime: Runtime) -> None:
    actors = [ray.remote(Echo).options(num_cpus=0).remote() for _ in range(3)]
    wires = Wires(actors[:2], actors[2])
    pool = WorkerPool(actors[:2], actors[2], wires)
    with pytest.raises(ZeroDivisionError):
        pool.deal("echo", Dealer(4, most=1), lambda block: (12 // (2 - block.start),), str, carrier=wires)
    calls = pool.deal("echo", Dealer(4, most=1), lambda block: (block.start,), str, carrier=wires)
    assert [call.value for call in calls] == [0, 1, 2, 3]
    assert wires.ask("echo", 7) == 7
    wires.close()


@pytest.mark.ray
def test_nothing_is_left_of_a_wire_that_nobody_uses(own: Runtime, digits: Dataset) -> None:
    def threads(_: Any) -> int:
        return len([thread for thread in threading.enumerate() if "_answer" in thread.name])

    def count() -> list[int]:
        return ray.get([actor.__ray_call__.remote(threads) for actor in (*own.pool.workers, own.server)])

    before = count()
    run(small_experiment(federation={"rounds": 1}), digits, own)
    assert count() == [number + 1 for number in before]
    assert own.pool.wires is not None
    own.pool.wires.close()
    while count() != before:
        time.sleep(0.01)
