"""What it takes to carry a round: two workers that only keep a core busy, and a server that only adds.

    python -m benchmarks.transport [--work 5 30] [--rounds 60] [--blocks 3]

The weights of the DLG LeNet go to the workers, a sum of their size from each to the server, and new weights back.
Three carriers. `calls`: Ray's, as the engine makes them on a cluster. `wires`: the engine's sockets, by which the
driver talks to processes on its own machine; these two in turns. `graph`: Ray's compiled graph, whose messages go
through shared memory; last, because its processes do not sleep while they wait. It deals each worker its share
once, and ends with the first process that dies.

One JSON line for each carrier and each `--work`, the milliseconds that a worker is busy. Medians: until the last
worker begins; from the last worker's end to the server's begin; from the server's end to the driver; all that the
round took beyond the work. Then the pause between two calls that wait at the same worker, and how busy a process
is that waits, in percent of a core.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from ray.dag import InputNode, MultiOutputNode

from benchmarks.engine import experiment
from benchmarks.peers.workload import LeNet
from fedsim.engine.carriers import Carrier
from fedsim.engine.dealing import LEAST_CLIENTS, Dealer
from fedsim.engine.pool import WorkerPool
from fedsim.engine.runtime import Runtime
from fedsim.engine.wires import Answering, Wires

Weights = NDArray[np.float32]
Span = tuple[float, float]
"""When something began and ended, by a clock that all processes of a Linux machine share."""


class Worker(Answering):
    """Keeps a core busy, and returns a sum."""

    def pid(self) -> int:
        """Return this process's id."""
        return os.getpid()

    @ray.method(num_returns=2)
    def work(self, weights: Weights, seconds: float) -> tuple[Weights, Span]:
        """Return a copy of the weights, and when this began and ended."""
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            pass
        return weights.copy(), (began, time.perf_counter())


class Server(Answering):
    """Adds."""

    @ray.method(num_returns=2)
    def add(self, *parts: Weights) -> tuple[Weights, Span]:
        """Return the mean, and when this began and ended."""
        began = time.perf_counter()
        weights = sum(parts) / np.float32(len(parts))
        return weights, (began, time.perf_counter())


Round = Callable[[Weights, float], tuple[Span, list[Span]]]
"""Runs one; returns when the server began and ended, and when the workers did."""


def by(pool: WorkerPool, carrier: Carrier) -> Round:
    def run(weights: Weights, seconds: float) -> tuple[Span, list[Span]]:
        shared = (weights, seconds)
        dealer = Dealer(2, LEAST_CLIENTS)
        calls = pool.deal("work", dealer, lambda block: (), str, shared=shared, carrier=carrier)
        _, span = carrier.ask("add", *(call.value[0] for call in calls))
        return span, [call.value[1] for call in calls]

    return run


def by_graph(workers: list[Any], server: Any) -> tuple[Round, Any]:
    with InputNode() as given:
        parts = [worker.work.bind(given[0], given[1]) for worker in workers]
        graph = MultiOutputNode([*server.add.bind(*[total for total, _ in parts]), *[span for _, span in parts]])
    compiled = graph.experimental_compile()

    def run(weights: Weights, seconds: float) -> tuple[Span, list[Span]]:
        _, server_span, *spans = ray.get(compiled.execute(weights, seconds))
        return server_span, spans

    return run, compiled


def trip(run: Round, weights: Weights, seconds: float) -> tuple[float, ...]:
    """Milliseconds to the workers, to the server, back, and beyond the work."""
    began = time.perf_counter()
    server, spans = run(weights, seconds)
    ended = time.perf_counter()
    last_begin, last_end = max(begin for begin, _ in spans), max(end for _, end in spans)
    parts = (last_begin - began, server[0] - last_end, ended - server[1], ended - began - seconds)
    return tuple(1000 * part for part in parts)


def pause(worker: Any, weights: Weights) -> float:
    """Milliseconds between the end of a call and the begin of one that waited for it."""
    spans = [ray.get(span) for _, span in [worker.work.remote(weights, 0.005) for _ in range(2)]]
    return 1000 * (spans[1][0] - spans[0][1])


def busy(pid: int, seconds: float = 3.0) -> float:
    """Percent of a core that a process takes."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return 100 * (sum(process.cpu_times()[:2]) - before) / seconds


def measure(carriers: dict[str, Round], weights: Weights, options: argparse.Namespace) -> None:
    for milliseconds in options.work:
        trips: dict[str, list[tuple[float, ...]]] = {name: [] for name in carriers}
        for _ in range(options.blocks):
            for name, run in carriers.items():
                trips[name] += [trip(run, weights, milliseconds / 1000) for _ in range(options.rounds)]
        for name, rows in trips.items():
            medians = [round(statistics.median(part), 2) for part in zip(*rows, strict=True)]
            columns = ("ms_to_workers", "ms_to_server", "ms_back", "ms_beyond_the_work")
            row = {"by": name, "ms_work": milliseconds, **dict(zip(columns, medians, strict=True))}
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=float, nargs="+", default=[5, 30], help="milliseconds a worker is busy")
    parser.add_argument("--rounds", type=int, default=60, help="rounds a block")
    parser.add_argument("--blocks", type=int, default=3)
    options = parser.parse_args()
    weights = np.zeros(sum(p.numel() for p in LeNet().parameters()), np.float32)
    with Runtime(experiment(1, 1, 1).runtime):
        remote = [ray.remote(kind).options(num_cpus=0).remote() for kind in (Worker, Worker, Server)]
        workers, server = remote[:2], remote[2]
        wires = Wires(workers, server)
        wires.connect()
        pool = WorkerPool(workers, server, wires)
        measure({"calls": by(pool, pool.calls), "wires": by(pool, wires)}, weights, options)
        pid = ray.get(workers[0].pid.remote())
        waiting = {"percent_busy_wires": busy(pid)}
        waiting["ms_between_two_calls"] = statistics.median(pause(workers[0], weights) for _ in range(60))
        wires.close()
        graph, compiled = by_graph(workers, server)
        waiting["percent_busy_graph"] = busy(pid)
        measure({"graph": graph}, weights, options)
        compiled.teardown()
        print(json.dumps({name: round(value, 2) for name, value in waiting.items()}))


if __name__ == "__main__":
    main()
