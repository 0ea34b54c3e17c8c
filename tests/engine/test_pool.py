import os
import time
from collections.abc import Iterator

import pytest
import ray

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
        if not os.path.exists(mark):
            open(mark, "w").close()
            os._exit(1)
        return value

    def die_if(self, value: int, poison: int) -> int:
        if value == poison:
            os._exit(1)
        return value


@pytest.fixture
def pool(runtime: Runtime) -> Iterator[WorkerPool]:
    actor = ray.remote(Echo).options(max_restarts=-1, max_task_retries=0, num_cpus=0)
    pool = WorkerPool([actor.remote() for _ in range(2)])
    yield pool
    for worker in pool.workers:
        ray.kill(worker)


def test_results_come_back_in_call_order_whoever_finishes_first(pool: WorkerPool) -> None:
    calls = [(i, 0.2 if i == 0 else 0.0) for i in range(8)]
    ended: list[int] = []
    references = pool.map("work", calls, str, lambda index, _: ended.append(index))
    assert ray.get([r[0] for r in references]) == [i * i for i in range(8)]
    assert sorted(ended) == list(range(8))
    assert ended != list(range(8))


def test_a_call_whose_worker_died_is_done_by_another(pool: WorkerPool, tmp_path: object) -> None:
    mark = f"{tmp_path}/died"
    references = pool.map("die_unless_marked", [(i, mark) for i in range(6)], str)
    assert ray.get([r[0] for r in references]) == list(range(6))
    assert pool.faults.workers_lost >= 1
    assert pool.faults.chunks_retried >= 1


def test_a_call_that_kills_every_worker_is_named_and_no_other(pool: WorkerPool) -> None:
    with pytest.raises(RunError, match="the chunk of client 2 cost 3 workers"):
        pool.map("die_if", [(i, 2) for i in range(5)], lambda index: f"the chunk of client {index}")
    # One more than the three if a finished call's answer was lost with the process and took the blame.
    assert pool.faults.workers_lost in (3, 4)
    references = pool.map("work", [(3,)], str)
    assert ray.get(references[0][0]) == 9


def test_an_error_in_the_work_itself_is_not_retried(pool: WorkerPool) -> None:
    with pytest.raises(TypeError):
        pool.map("work", [("text",)], str)
    assert pool.faults.chunks_retried == 0
