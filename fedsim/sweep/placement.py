"""Room for trials: what each asks of Ray, and whether there could ever be room for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch
from ray import tune

from fedsim.config import RuntimeConfig
from fedsim.engine.runtime import local_cpus
from fedsim.errors import ConfigError


@dataclass(frozen=True, order=True)
class Request:
    """What one trial asks for: so many workers, one CPU each and a fraction of a GPU where there are GPUs."""

    workers: int
    gpus_per_worker: float

    def group(self, gpus: bool) -> tune.PlacementGroupFactory:
        """Return the placement group: all of it or nothing, so that trials cannot wait for each other.

        The trial's own process and the parameter server mostly wait, and ask for nothing.
        """
        worker = {"CPU": 1.0, "GPU": self.gpus_per_worker} if gpus else {"CPU": 1.0}
        return tune.PlacementGroupFactory([{}, *([worker] * self.workers)], strategy="PACK")


def request(runtime: RuntimeConfig) -> Request:
    """Return what a trial with this runtime asks for; `workers: auto` is one."""
    return Request(1 if runtime.workers == "auto" else runtime.workers, runtime.gpus_per_worker)


@dataclass(frozen=True)
class Room:
    """CPUs and GPUs of each node; `growing` when an autoscaler may add nodes."""

    nodes: tuple[tuple[float, float], ...]
    growing: bool = False

    @property
    def cpus(self) -> int:
        """CPUs of all nodes."""
        return int(sum(cpus for cpus, _ in self.nodes))

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(gpus for _, gpus in self.nodes)

    def workers(self, gpus_per_worker: float) -> int:
        """Return how many workers there could be at a time; a worker's share lies on one GPU."""
        if not self.gpus:
            return self.cpus
        a_gpu = int(1 / gpus_per_worker + 1e-9)
        return sum(min(int(cpus), int(gpus) * a_gpu) for cpus, gpus in self.nodes)


def this_machine() -> Room:
    """Return the room of a private Ray on this machine."""
    return Room(((float(local_cpus()), float(torch.cuda.device_count())),))


def of_ray() -> Room:
    """Return the room of the Ray that this process is connected to."""
    from ray._private.state import state

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple((each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in alive)
    return Room(nodes, growing=state.get_max_resources_from_cluster_config() is not None)


def check(requests: Sequence[Request], room: Room) -> None:
    """See that every trial could be placed if it were alone.

    Raises:
        ConfigError: If one could not, however long it waited.
    """
    if room.growing:
        return
    for wanted in requests:
        most = room.workers(wanted.gpus_per_worker)
        if wanted.workers > most:
            share = f" and {wanted.gpus_per_worker:g} GPU" if room.gpus else ""
            there = f"{room.cpus} CPUs" + (f" and {room.gpus:g} GPUs" if room.gpus else "")
            raise ConfigError(
                f"runtime.workers: a trial needs {wanted.workers} workers of 1 CPU{share} each, and there are "
                f"{there} on {len(room.nodes)} node(s), room for {most}: it could never start"
            )
