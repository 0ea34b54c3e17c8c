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


class Runtime:
    """A Ray runtime with its worker pool; use it as a context manager.

    Attributes:
        pool: The workers.
        server: Handle of the parameter-server actor.
    """

    def __init__(self, config: RuntimeConfig, address: str | None = None) -> None:
        """Connect to the cluster at `address`, or start a private Ray on this machine.

        Raises:
            ConfigError: If the cluster cannot be reached or has not the resources for one worker.
        """
        self._temporary: str | None = None
        self._config = config
        self._start(address)
        try:
            gpus = ray.cluster_resources().get("GPU", 0)
            resources: dict[str, Any] = {"num_cpus": 1}
            if gpus:
                resources["num_gpus"] = config.gpus_per_worker
            count = self._worker_count(gpus)
            restart = {"max_restarts": -1, "max_task_retries": 0}
            worker = ray.remote(ClientWorker).options(**restart, **resources)
            server = ray.remote(ParameterServer).options(**restart, num_cpus=0)
            paths = [os.getcwd(), *sys.path]
            self.pool = WorkerPool([worker.remote(paths) for _ in range(count)])
            self.server = server.remote(paths)
        except BaseException:
            self.close()
            raise
        self._puts: dict[str, Any] = {}

    def put(self, key: str, value: object) -> Any:
        """Put `value` into the object store once under `key`; return the reference."""
        if key not in self._puts:
            self._puts[key] = ray.put(value)
        return self._puts[key]

    def _start(self, address: str | None) -> None:
        cpus = local_cpus()
        common: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR}
        if address is not None:
            check_address(address)
        else:
            wanted = self._config.workers
            self._temporary = tempfile.mkdtemp(prefix="fedsim-")
            common["_temp_dir"] = self._temporary
            common["num_cpus"] = cpus if wanted == "auto" else max(cpus, wanted)
        try:
            ray.init(address=address or "local", namespace="fedsim", **common)
        except (RayError, ConnectionError, ValueError, RuntimeError) as error:
            self.close()
            where = address or "this machine"
            raise ConfigError(f"no Ray runtime at {where}: {str(error).splitlines()[0]}") from error

    def _worker_count(self, gpus: float) -> int:
        if self._config.workers != "auto":
            return self._config.workers
        if gpus:
            return max(1, int(gpus / self._config.gpus_per_worker))
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def close(self) -> None:
        """Stop the actors, the private runtime and its files."""
        ray.shutdown()
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

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
