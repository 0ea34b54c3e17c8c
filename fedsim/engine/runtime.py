"""Ray itself: one runtime, one pool and one parameter server for all the simulations of a command."""

import logging
import os
import shutil
import socket
import sys
import tempfile
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedsim.config import RuntimeConfig
from fedsim.engine.pool import WorkerPool
from fedsim.engine.server import ParameterServer
from fedsim.engine.worker import ClientWorker
from fedsim.errors import ConfigError

CONNECT_SECONDS = 5


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
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"no Ray runtime at {address}: {error.strerror or error}") from error


def start_ray(address: str | None, cpus: int, **options: Any) -> str | None:
    """Connect to the cluster at `address`, or start a private Ray with `cpus` CPUs on this machine.

    Returns:
        The private Ray's temporary folder, for `stop_ray`.

    Raises:
        ConfigError: If there is no Ray to be had.
    """
    common: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR, **options}
    temporary = None
    if address is not None:
        check_address(address)
    else:
        temporary = tempfile.mkdtemp(prefix="fedsim-")
        common |= {"_temp_dir": temporary, "num_cpus": cpus}
    try:
        ray.init(address=address or "local", namespace="fedsim", **common)
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        stop_ray(temporary)
        where = address or "this machine"
        raise ConfigError(f"no Ray runtime at {where}: {str(error).splitlines()[0]}") from error
    return temporary


def stop_ray(temporary: str | None) -> None:
    """Leave Ray; a private one ends, and its files go."""
    ray.shutdown()
    if temporary:
        shutil.rmtree(temporary, ignore_errors=True)


class Runtime:
    """A Ray runtime with its worker pool; use it as a context manager.

    Attributes:
        pool: The workers.
        server: Handle of the parameter-server actor.
    """

    def __init__(
        self, config: RuntimeConfig, address: str | None = None, group: PlacementGroup | None = None
    ) -> None:
        """Connect to the cluster at `address`, or start a private Ray on this machine.

        Given a placement group, Ray is up already and is left as it is: one worker is placed in each bundle of
        the group, and the server wherever there is room in it.

        Raises:
            ConfigError: If the cluster cannot be reached or has not the resources for one worker.
        """
        self._temporary: str | None = None
        self._config, self._group = config, group
        if group is None:
            cpus = local_cpus()
            wanted = cpus if config.workers == "auto" else config.workers
            self._temporary = start_ray(address, max(cpus, wanted))
        try:
            restart = {"max_restarts": -1, "max_task_retries": 0}
            worker, server = ray.remote(ClientWorker), ray.remote(ParameterServer)
            paths = [os.getcwd(), *sys.path]
            self.pool = WorkerPool([worker.options(**restart, **o).remote(paths) for o in self._placements()])
            self.server = server.options(**restart, num_cpus=0, **self._inside(-1)).remote(paths)
        except BaseException:
            self.close()
            raise
        self._puts: dict[str, Any] = {}

    def _placements(self) -> list[dict[str, Any]]:
        """Return what each worker asks of Ray."""
        if self._group:
            bundles = self._group.bundle_specs
            return [
                {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), **self._inside(index)}
                for index, bundle in enumerate(bundles)
            ]
        gpus = ray.cluster_resources().get("GPU", 0)
        share = {"num_gpus": self._config.gpus_per_worker} if gpus else {}
        return [{"num_cpus": 1, **share}] * self._worker_count(gpus)

    def _inside(self, bundle: int) -> dict[str, Any]:
        if not self._group:
            return {}
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, bundle)}

    def put(self, key: str, value: object) -> Any:
        """Put `value` into the object store once under `key`; return the reference."""
        if key not in self._puts:
            self._puts[key] = ray.put(value)
        return self._puts[key]

    def share(self, key: str, reference: Any) -> None:
        """Use `reference`, which somebody else has put, where `put` is asked for `key`."""
        self._puts[key] = reference

    def _worker_count(self, gpus: float) -> int:
        if self._config.workers != "auto":
            return self._config.workers
        if gpus:
            return max(1, int(gpus / self._config.gpus_per_worker))
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def close(self) -> None:
        """Stop the actors, the private runtime and its files; a Ray that was up before stays up."""
        if self._group is None:
            stop_ray(self._temporary)
            self._temporary = None
            return
        for actor in (*self.pool.workers, self.server):
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
