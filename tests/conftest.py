import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from fedsim.config import ExperimentConfig, RuntimeConfig, parse_config
from fedsim.engine.pool import WorkerPool
from fedsim.engine.runtime import Runtime
from fedsim.engine.worker import ClientWorker


def small_experiment(**settings: Any) -> ExperimentConfig:
    """A simulation of seconds on the digits: 6 rounds, 20 clients, 9 a round in chunks of 1 or 2."""
    federation = {"rounds": 6, "clients": 20, "clients_per_round": 9, "batch_size": 16, "evaluate_every": 3}
    data: dict[str, Any] = {
        "name": "small",
        "model": {"init": "uniform"},
        "federation": federation | settings.pop("federation", {}),
        "runtime": {"clients_per_chunk": 2},
        "checkpoint_every": 2,
    }
    return parse_config(data | settings)


@pytest.fixture(scope="session")
def runtime() -> Iterator[Runtime]:
    """One Ray runtime with two workers for all the tests that do not break it."""
    with Runtime(RuntimeConfig(workers=2)) as shared:
        yield shared


@contextmanager
def other_workers(runtime: Runtime, count: int) -> Iterator[WorkerPool]:
    """Lend the runtime a pool of `count` fresh workers."""
    actor = ray.remote(ClientWorker).options(max_restarts=-1, max_task_retries=0, num_cpus=0)
    workers = [actor.remote(sys.path) for _ in range(count)]
    own, runtime.pool = runtime.pool, WorkerPool(workers, runtime.server)
    try:
        yield runtime.pool
    finally:
        for worker in runtime.pool.workers:
            ray.kill(worker)
        runtime.pool = own
