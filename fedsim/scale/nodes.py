"""Several Ray nodes on this machine, so that what passes between nodes counts."""

import os
import shutil
import tempfile
from types import TracebackType
from typing import Any

from fedsim.engine.lean_node import free_port
from fedsim.errors import RunError

STORE_BYTES = 512 * 2**20
"""Object store of each node; every node that a worker runs on keeps a copy of the data set."""


class LocalNodes:
    """Raylets that share this machine; use it as a context manager, whose value is their address."""

    def __init__(self, nodes: int, cpus: int) -> None:
        """Start `nodes` of them with room for `cpus` workers in all, when entered."""
        self.nodes, self.cpus = nodes, -(-cpus // nodes)
        self._temporary, self._before = "", os.environ.get("RAY_TMPDIR")
        self._cluster: Any = None

    def __enter__(self) -> str:
        """Start the nodes and return the address to connect to."""
        from ray.cluster_utils import Cluster

        self._temporary = tempfile.mkdtemp(prefix="fedsim-")
        # Ray also notes the newest cluster's address there, where another Ray of this user must not find it.
        os.environ["RAY_TMPDIR"] = self._temporary
        try:
            self._cluster = Cluster()
            for _ in range(self.nodes):
                self._cluster.add_node(
                    num_cpus=self.cpus,
                    object_store_memory=STORE_BYTES,
                    include_dashboard=False,
                    dashboard_agent_listen_port=free_port(),
                )
        except Exception as error:  # Ray raises a bare Exception when its processes are slow to start
            self._stop()
            raise RunError(f"--nodes: Ray did not start on this machine: {str(error).splitlines()[0]}") from error
        except BaseException:
            self._stop()
            raise
        return str(self._cluster.address)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the nodes and remove their files."""
        self._stop()

    def _stop(self) -> None:
        try:
            if self._cluster:
                self._cluster.shutdown()
        finally:
            os.environ.pop("RAY_TMPDIR", None)
            if self._before is not None:
                os.environ["RAY_TMPDIR"] = self._before
            shutil.rmtree(self._temporary, ignore_errors=True)
