import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from fedsim.engine import pool as pool_module
from fedsim.engine.dealing import Dealer
from fedsim.engine.pool import WorkerPool
from fedsim.engine.runtime import Runtime
from fedsim.errors import RunError

pytestmark = pytest.mark.ray


class Echo:
    """A worker that answers, sleeps or dies on demand."""

    def pid(self) -> int:
        return os.getpid()

    def work(self, value: int, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        return value * value

    def die_unless_marked(self, value: int, mark: str) -> int:
        """Of all workers, the first to come dies: that it marks and that it looks is one step."""
        with contextlib.suppress(FileExistsError):
            open(mark, "x").close()
            os._exit(1)
        return value

    def die_if(self, value: int, poison: int) -> int:
        if value == poison:
            os._exit(1)
        return value

    def all_but_marked(self, start: int, size: int, mark: str) -> list[int]:
        self.die_unless_marked(start, mark)
        return list(range(start, start + size))

    def die_if_among(self, start: int, size: int, poison: int) -> None:
        for number in range(start, start + size):
            self.die_if(number, poison)


@pytest.fixture
def pool(runtime: Runtime) -> Iterator[WorkerPool]:
    actor = ray.remote(Echo).options(max_restarts=-1, max_task_retries=0, num_cpus=0)
    pool = WorkerPool([actor.remote() for _ in range(2)])
    yield pool
    for worker in pool.workers:
        ray.kill(worker)


def test_results_come_back_in_call_order_whoever_finishes_first(pool: WorkerPool) -> None:
    calls = [(i, 0.2 if i == 0 else 0.0) for i in range(8)]
    assert pool.map("work", calls, str) == [i * i for i in range(8)]


def test_a_call_whose_worker_died_is_done_by_another(pool: WorkerPool, tmp_path: object) -> None:
    mark = f"{tmp_path}/died"
    assert pool.map("die_unless_marked", [(i, mark) for i in range(6)], str) == list(range(6))
    assert pool.faults.workers_lost >= 1
    assert pool.faults.chunks_retried >= 1


def test_a_call_that_kills_every_worker_is_named_and_no_other(pool: WorkerPool) -> None:
    with pytest.raises(RunError, match="the chunk of client 2 cost 3 workers"):
        pool.map("die_if", [(i, 2) for i in range(5)], lambda index: f"the chunk of client {index}")
    # One more than the three if a finished call's answer was lost with the process and took the blame.
    assert pool.faults.workers_lost in (3, 4)
    assert pool.map("work", [(3,)], str) == [9]


def test_a_block_whose_worker_died_is_done_one_by_one(pool: WorkerPool, tmp_path: object) -> None:
    mark = f"{tmp_path}/died"
    calls = pool.deal("all_but_marked", Dealer(20), lambda block: (block.start, block.size, mark), str)
    assert [number for call in calls for number in call.value] == list(range(20))
    sizes = [call.block.size for call in calls]
    assert max(sizes) == 8 and sizes.count(1) >= 8
    assert pool.faults.chunks_retried >= 8 and pool.faults.workers_lost == 1


def test_a_number_that_kills_workers_is_found_within_its_block(pool: WorkerPool) -> None:
    with pytest.raises(RunError, match="the chunk of client 9 cost 3 workers"):
        pool.deal(
            "die_if_among",
            Dealer(20),
            lambda block: (block.start, block.size, 9),
            lambda index: f"the chunk of client {index}",
        )


def test_an_error_in_the_work_itself_is_not_retried(pool: WorkerPool) -> None:
    with pytest.raises(TypeError):
        pool.map("work", [("text",)], str)
    assert pool.faults.chunks_retried == 0


class Slow(Echo):
    """A worker whose second life does not begin before a file is there."""

    def __init__(self, mark: str) -> None:
        if os.path.exists(f"{mark}.born"):
            while not os.path.exists(mark):
                time.sleep(0.01)
        open(f"{mark}.born", "w").close()


class Clock:
    """Time as it is, plus a leap at each sleep while it is `leaping`."""

    leap, leaping = 0.0, True

    def monotonic(self) -> float:
        return time.monotonic() + self.leap

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.leap += 1000 * self.leaping


def test_a_worker_is_not_away_while_it_works_however_long(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = ray.remote(Echo).options(max_restarts=-1, max_task_retries=0, num_cpus=0).remote()
    pool, clock = WorkerPool([actor]), Clock()
    clock.leaping = False

    def wait_for_long(workers: list[int], timeout: float | None) -> int | None:
        clock.leap += 1000 * (timeout is None)
        return wait(workers, timeout)

    wait = pool.calls.wait
    monkeypatch.setattr(pool.calls, "wait", wait_for_long)
    monkeypatch.setattr(pool_module, "time", clock)
    assert pool.map("die_unless_marked", [(7, f"{tmp_path}/died")], str) == [7]
    assert pool.faults.workers_lost == 1 and clock.leap >= 1000
    ray.kill(actor)


def test_workers_that_stayed_away_too_long_are_not_held_against_the_next_simulation(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = str(tmp_path / "mark")
    actor = ray.remote(Slow).options(max_restarts=-1, max_task_retries=0, num_cpus=0)
    pool = WorkerPool([actor.remote(mark)], recovery_seconds=500)
    os.kill(ray.get(pool.ping(0)), signal.SIGKILL)
    clock = Clock()
    monkeypatch.setattr(pool_module, "time", clock)
    with pytest.raises(RunError, match="all 1 workers died and none came back in 500 s"):
        pool.map("work", [(3,)], str)
    clock.leaping = False
    threading.Timer(1.0, open, (mark, "w")).start()
    assert pool.map("work", [(3,)], str) == [9]
    ray.kill(pool.workers[0])


def test_a_worker_that_is_gone_for_good_is_done_without(pool: WorkerPool) -> None:
    ray.kill(pool.workers[1], no_restart=True)
    pool.recovery_seconds = 0.0
    for _ in range(2):
        assert pool.map("work", [(i,) for i in range(6)], str) == [i * i for i in range(6)]
    assert pool.faults.workers_lost == 1
