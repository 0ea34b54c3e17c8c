"""What a cell of the study takes: time, memory, bytes."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd
import psutil
import ray

from fedsim.config import RuntimeConfig
from fedsim.engine.federation import Federation
from fedsim.engine.pool import WorkerPool
from fedsim.engine.rounds import RoundRecord
from fedsim.engine.runtime import Cluster, Runtime, local_cpus
from fedsim.scale.grid import Cell, Workload, describe
from fedsim.scale.load import CpuTimes
from fedsim.scale.nodes import LocalNodes

WARM_CLIENTS = 1000
"""A cohort this large needs no warm-up round: what a process's first steps cost is lost in its round time."""
PARTS = ("local", "defense", "aggregate", "compensate", "other")
"""Where a round's time goes; a worker's mean for the first two, the server's for the next two."""


@contextmanager
def started(runtime: RuntimeConfig, workers: int, address: str | None, nodes: int = 1) -> Iterator["Pool"]:
    """Start Ray, here or on several nodes here, or connect to `address`; start so many workers on it."""
    private = address is None
    with ExitStack() as stack:
        if address is None and nodes > 1:
            address = stack.enter_context(LocalNodes(nodes, workers))
        stack.enter_context(Cluster(address, workers))
        before = time.perf_counter()
        config = runtime.model_copy(update={"workers": workers})
        yield Pool(stack.enter_context(Runtime(config)), before, private)


class Pool:
    """The workers that a part of the study shares; each cell uses the first few."""

    def __init__(self, runtime: Runtime, started_at: float, private: bool = True) -> None:
        """Wait until all are up, and order them so that the first few are on as many nodes as can be.

        Args:
            runtime: Holds the workers.
            started_at: When they were started, by `time.perf_counter`.
            private: Whether all of Ray's processes are children of this one.
        """
        self.runtime, self.private = runtime, private
        homes = ray.get([worker.__ray_call__.remote(_node) for worker in runtime.pool.workers])
        self.startup_seconds = time.perf_counter() - started_at
        by_node = [
            [(worker, home) for worker, home in zip(runtime.pool.workers, homes, strict=True) if home == node]
            for node in sorted(set(homes))
        ]
        self._ordered = [pair for row in zip_longest(*by_node) for pair in row if pair]

    def first(self, count: int) -> Runtime:
        """Return the runtime with the first `count` workers only, and no wires: a cluster has none."""
        part = copy.copy(self.runtime)
        part.pool = WorkerPool([worker for worker, _ in self._ordered[:count]], self.runtime.server)
        return part

    def nodes(self, count: int) -> int:
        """Return on how many nodes the first `count` workers are."""
        return len({node for _, node in self._ordered[:count]})

    @property
    def cores(self) -> int:
        """CPUs that the workers run on: this machine's, or those that a cluster has for them."""
        return local_cpus() if self.private else int(ray.cluster_resources().get("CPU", 1))

    def memory(self, count: int) -> dict[str, float]:
        """Return bytes that no other process shares: of the first workers, the server and the driver."""
        processes = [worker for worker, _ in self._ordered[:count]] + [self.runtime.server]
        *workers, server = ray.get([process.__ray_call__.remote(_unique_bytes) for process in processes])
        return {
            "worker_bytes": float(np.mean(workers)),
            "worker_bytes_max": float(max(workers)),
            "server_bytes": float(server),
            "driver_bytes": float(_unique_bytes()),
        }


def _node(_: Any) -> str:
    return str(ray.get_runtime_context().get_node_id())


def _unique_bytes(_: Any = None) -> int:
    return int(psutil.Process().memory_full_info().uss)


@dataclass(frozen=True)
class StoreUse:
    """Object stores of all nodes: bytes they hold, and bytes ever put into them (a copy on a node counts)."""

    held: int
    created: int

    @classmethod
    def now(cls) -> "StoreUse":
        """Ask every node."""
        from ray._private.internal_api import node_stats

        alive = [node for node in ray.nodes() if node["Alive"]]
        stats = [
            node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False).store_stats
            for node in alive
        ]
        held = sum(one.object_store_bytes_used for one in stats)
        return cls(held, sum(one.cumulative_created_bytes for one in stats))


@dataclass(frozen=True)
class MeasuredRound:
    """One round of a cell.

    Attributes:
        cell: The cell.
        record: Its times.
        store_bytes: What it put into the object stores.
        others_cpu: Share of the machine's CPU time that went to other processes; NaN on a cluster.
    """

    cell: Cell
    record: RoundRecord
    store_bytes: int
    others_cpu: float

    def row(self) -> dict[str, Any]:
        """Return the round as a row; local and defense time as a worker's mean."""
        record, workers = self.record, self.cell.workers
        seconds = {
            "local": record.local_seconds / workers,
            "defense": record.defense_seconds / workers,
            "aggregate": record.aggregate_seconds,
            "compensate": record.compensate_seconds,
        }
        seconds["other"] = record.seconds - sum(seconds.values())
        return {
            **asdict(self.cell),
            "round": record.round,
            "seconds": record.seconds,
            **{f"{part}_seconds": seconds[part] for part in PARTS},
            "upload_bytes": record.upload_bytes,
            "store_bytes": self.store_bytes,
            "others_cpu": self.others_cpu,
        }


def measure(
    cells: Sequence[Cell], workload: Workload, pool: Pool, note: Callable[[str], None]
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Measure the cells of one cohort size, their rounds in turn on the same workers, because clocks drift.

    Returns:
        One row a measured round, and one row a cell.
    """
    rounds: list[MeasuredRound] = []
    with ExitStack() as stack:
        open_ = {cell: _open(stack, cell, workload, pool) for cell in cells}
        config = workload.config
        warmup = 0 if cells[0].clients >= WARM_CLIENTS else config.warmup
        began = time.perf_counter()
        for number in range(warmup + config.rounds):
            if number > warmup and time.perf_counter() - began > config.longest:
                note(
                    f"{cells[0].clients} clients: {number - warmup} of {config.rounds} rounds in the time allowed"
                )
                break
            turn = [_round(cell, open_[cell], number, pool) for cell in (cells if number % 2 else reversed(cells))]
            rounds += turn if number >= warmup else []
        frame = pd.DataFrame([one.row() for one in rounds])
        return frame, [_row(cell, frame, workload, pool) for cell in cells]


def _open(stack: ExitStack, cell: Cell, workload: Workload, pool: Pool) -> Federation:
    federation = Federation(workload.spec(cell), workload.dataset, pool.first(cell.workers))
    stack.callback(federation.close)
    return federation


def _round(cell: Cell, federation: Federation, number: int, pool: Pool) -> MeasuredRound:
    store, cpu = StoreUse.now().created, CpuTimes.now()
    record = federation.run_round(number)
    others = CpuTimes.now().others_since(cpu) if pool.private else float("nan")
    return MeasuredRound(cell, record, StoreUse.now().created - store, others)


def _row(cell: Cell, rounds: pd.DataFrame, workload: Workload, pool: Pool) -> dict[str, Any]:
    """Return a cell's row: the median round time, with quartiles, divided by the mean share of each part."""
    own = of_cell(rounds, cell)
    seconds = own["seconds"].median()
    return {
        **describe(cell),
        "nodes": pool.nodes(cell.workers),
        "cores": pool.cores,
        "rounds": len(own),
        "seconds": seconds,
        "seconds_low": own["seconds"].quantile(0.25),
        "seconds_high": own["seconds"].quantile(0.75),
        **{f"{part}_seconds": seconds * (own[f"{part}_seconds"] / own["seconds"]).mean() for part in PARTS},
        "over_none": _over_none(cell, rounds),
        "weights_bytes": workload.weights_bytes,
        "upload_bytes": own["upload_bytes"].mean(),
        "uploaded_bytes": own["upload_bytes"].mean() * cell.clients,
        "store_bytes_round": own["store_bytes"].mean(),
        "store_bytes_held": StoreUse.now().held,
        **pool.memory(cell.workers),
        "startup_seconds": pool.startup_seconds,
        "others_cpu": own["others_cpu"].mean(),
    }


def of_cell(frame: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """Return the rows of a cell."""
    mine = np.logical_and.reduce([frame[name] == value for name, value in asdict(cell).items()])
    return frame[mine]


def _over_none(cell: Cell, rounds: pd.DataFrame) -> float:
    """Return the defense's share of a round: the median of the paired ratios to no defense, less one."""
    bare = of_cell(rounds, Cell(cell.clients, cell.workers, cell.clients_per_chunk, "none"))
    if cell.defense == "none" or bare.empty:
        return float("nan")
    pairs = of_cell(rounds, cell).merge(bare, on="round", suffixes=("", "_none"))
    return float((pairs["seconds"] / pairs["seconds_none"]).median() - 1)
