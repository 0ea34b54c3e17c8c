"""Ray itself: one runtime, one pool and one parameter server for all the simulations of a command."""

import logging
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.config import RuntimeConfig
from fedsim.engine.lean_node import lean_node
from fedsim.engine.pool import WorkerPool
from fedsim.engine.scratch import Scratch
from fedsim.engine.server import ParameterServer
from fedsim.engine.wires import Wires
from fedsim.engine.worker import ClientWorker
from fedsim.errors import ConfigError
from fedsim.reachable import check_reachable


def local_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_address(address: str) -> None:
    """See that somebody listens at `host:port`: Ray itself would try for minutes.

    Raises:
        ConfigError: If nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    check_reachable(host, int(port), f"no Ray runtime at {address}")


class Cluster:
    """Ray itself: a private one on this machine, or a connection to one that runs; use it as a context manager."""

    def __init__(self, address: str | None = None, cpus: int = 0) -> None:
        """Connect to the cluster at `address`, or start a private Ray with at least `cpus` CPUs.

        Raises:
            ConfigError: If the cluster cannot be reached.
        """
        self._scratch: Scratch | None = None
        self._terminate = signal.getsignal(signal.SIGTERM)
        common: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR}
        if address is not None:
            check_address(address)
        else:
            self._scratch = Scratch()
            common |= {"_temp_dir": str(self._scratch.path), "num_cpus": max(local_cpus(), cpus)}
        try:
            with lean_node():
                ray.init(address=address or "local", namespace="fedsim", **common)
            # Batch systems ask by SIGTERM what a person asks by Ctrl-C; Ray's own handler keeps nothing.
            _on_terminate(signal.default_int_handler)
        except BaseException as error:  # Ray raises a bare Exception when its processes are slow to start
            self.close()
            if isinstance(error, SystemExit):
                raise KeyboardInterrupt from None  # SIGTERM, which Ray's handler took for the end
            if not isinstance(error, Exception):
                raise
            where = address or "this machine"
            raise ConfigError(f"no Ray runtime at {where}: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        """Stop the private Ray and remove its files, or leave the cluster; SIGTERM is as it was before."""
        ray.shutdown()
        _on_terminate(self._terminate)
        if self._scratch:
            self._scratch.close()
            self._scratch = None

    def __enter__(self) -> "Cluster":
        """Return the cluster itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


class Runtime:
    """A worker pool and a parameter server on Ray; use it as a context manager.

    Attributes:
        pool: The workers.
        device: What the workers train on.
        server: Handle of the parameter-server actor.
    """

    def __init__(self, config: RuntimeConfig, address: str | None = None) -> None:
        """Start the actors on the Ray that this process is part of, the cluster at `address`, or a private Ray.

        Raises:
            ConfigError: If the cluster cannot be reached or has not the resources for one worker.
        """
        self._config = config
        self._actors: list[ActorHandle] = []
        self._wires: Wires | None = None
        wanted = 0 if config.workers == "auto" else config.workers
        self._cluster = None if ray.is_initialized() and address is None else Cluster(address, wanted)
        try:
            gpus = ray.cluster_resources().get("GPU", 0)
            resources: dict[str, Any] = {"num_cpus": 1}
            self.device = torch.device("cuda" if gpus else "cpu")
            if gpus:
                resources["num_gpus"] = config.gpus_per_worker
            count = self._worker_count(gpus)
            _check_room(count, resources)
            restart = {"max_restarts": -1, "max_task_retries": 0}
            worker = ray.remote(ClientWorker).options(**restart, **resources, **_spread())
            server = ray.remote(ParameterServer).options(**restart, num_cpus=0, scheduling_strategy=_here())
            paths = [os.getcwd(), *sys.path]
            workers = [worker.remote(paths, config.deterministic) for _ in range(count)]
            self.server = server.remote(paths)
            self._actors += [*workers, self.server]
            alone = sum(node["Alive"] for node in ray.nodes()) == 1
            wired = config.transport == "auto" and alone and not gpus
            self._wires = Wires(workers, self.server) if wired else None
            self.pool = WorkerPool(workers, self.server, self._wires)
        except BaseException:
            self.close()
            raise
        self._puts: dict[str, Any] = {}
        self.lessons: dict[str, tuple[Any, str]] = {}

    def put(self, key: str, value: object) -> Any:
        """Put `value` into the object store once under `key`; return the reference."""
        if key not in self._puts:
            self._puts[key] = ray.put(value)
        return self._puts[key]

    def share(self, key: str, reference: Any) -> None:
        """Let `put` of `key` return a reference that somebody else has put."""
        self._puts[key] = reference

    def _worker_count(self, gpus: float) -> int:
        if self._config.workers != "auto":
            return self._config.workers
        if gpus:
            return max(1, int(gpus / self._config.gpus_per_worker))
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def close(self) -> None:
        """Stop the actors, and the private Ray if this runtime started one."""
        if self._wires:
            self._wires.close()
        if self._cluster:
            self._cluster.close()
            return
        for actor in self._actors:
            ray.kill(actor)

    def __enter__(self) -> "Runtime":
        """Return the runtime itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the runtime."""
        self.close()


def _check_room(workers: int, resources: dict[str, Any]) -> None:
    """See that Ray has room for so many workers, each of which takes `resources`: it would wait for it for ever.

    Raises:
        ConfigError: If not.
    """
    if get_current_placement_group():
        return  # a trial's, which holds what its workers need
    there = ray.cluster_resources()
    for kind, each in {"CPU": resources["num_cpus"], "GPU": resources.get("num_gpus", 0)}.items():
        if workers * each > there.get(kind, 0) + 1e-6:  # a GPU's fractions are rounded
            raise ConfigError(
                f"runtime.workers: {workers} workers need {workers * each:g} {kind}, but Ray has "
                f"{there.get(kind, 0):g}; lower it"
            )


def _on_terminate(handler: Any) -> None:
    """Set what SIGTERM does, where that can be set: in the main thread."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _here() -> NodeAffinitySchedulingStrategy:
    """Keep the server on the driver's node, so that no other node's loss takes what the rounds have left."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _spread() -> dict[str, Any]:
    """Put workers on as many nodes as there are, or where a trial's placement group has room for them."""
    return {} if get_current_placement_group() else {"scheduling_strategy": "SPREAD"}
