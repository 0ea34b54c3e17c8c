"""A node is lost while a round runs: three raylets on this machine, in a process and a folder of their own."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.defenses.base import ClientContext, Defense
from tests.conftest import small_experiment

ROUND = 2
"""The round in which the node is lost."""


class Waiting(Defense):
    """Protects nothing; in round `ROUND` each worker waits with its second chunk until `lost` is there."""

    refresh_rounds = 1

    def __init__(self, folder: str) -> None:
        self.folder, self.prepared, self.chunks = Path(folder), 0, 0

    def prepare(self, context: Any) -> dict[str, Tensor]:
        self.prepared += 1
        return {"round": torch.tensor(float(self.prepared - 1))}

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        if context.public["round"] == ROUND:
            self.chunks += 1
            if self.chunks == 2:
                (self.folder / f"waits-{os.getpid()}").touch()
                while not (self.folder / "lost").exists():
                    time.sleep(0.01)
        return updates


def main(folder: Path) -> None:
    """Run once undisturbed, and once with a node that is lost in mid-round; leave the summaries in `folder`."""
    from ray.cluster_utils import Cluster

    from fedsim.config import RuntimeConfig
    from fedsim.engine.runtime import Runtime
    from fedsim.simulation import Simulation

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": str(folder / "ray")})
    lost = [cluster.add_node(**node) for _ in range(2)][0]
    # A model whose sums are too large to travel in messages: they lie in the object store of the worker's node.
    settings = {"model": {"name": "mlp", "hidden": [512]}, "federation": {"rounds": 4, "clients_per_round": 18}}

    def lose() -> None:
        while len(list((folder / "disturbed").glob("waits-*"))) < 3:
            time.sleep(0.01)
        cluster.remove_node(lost, allow_graceful=False)
        (folder / "disturbed/lost").touch()

    try:
        with Runtime(RuntimeConfig(workers=3), cluster.address) as runtime:
            for name in ("undisturbed", "disturbed"):
                (folder / name).mkdir()
                if name == "undisturbed":
                    (folder / name / "lost").touch()
                else:
                    threading.Thread(target=lose, daemon=True).start()
                defense = {
                    "name": "custom",
                    "factory": "tests.engine.test_nodes:Waiting",
                    "options": {"folder": str(folder / name)},
                }
                summary = Simulation(small_experiment(**settings, defense=defense), runtime=runtime).run().summary
                (folder / f"{name}.json").write_text(json.dumps(summary))
    finally:
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_node_costs_no_client_and_no_bit() -> None:
    with tempfile.TemporaryDirectory(prefix="fedsim-nodes-") as folder:
        command = [sys.executable, "-m", "tests.engine.test_nodes", folder]
        # A lost node is noticed after three silent half seconds, not after five times three seconds.
        health = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
        environment = {**os.environ, **health, "RAY_TMPDIR": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        undisturbed, disturbed = (
            json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("undisturbed", "disturbed")
        )
    assert not any(undisturbed["faults"].values())
    assert disturbed["model_sha256"] == undisturbed["model_sha256"]
    # One worker went with its node; beside the chunks that it held, those whose sums lay there were done again.
    assert disturbed["faults"]["workers_lost"] == 1
    assert disturbed["faults"]["chunks_retried"] > 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
