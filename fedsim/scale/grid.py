"""The cells of the scalability study, and the data that its clients hold."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from fedsim.config import ExperimentConfig, parse_config
from fedsim.data.datasets import Dataset, root_set
from fedsim.data.partitions import Partition
from fedsim.engine.dealing import call_count, chunk_count
from fedsim.engine.session import SessionSpec
from fedsim.environment import local_device
from fedsim.errors import ConfigError
from fedsim.randomness import Purpose, numpy_stream
from fedsim.schema import Schema, explain
from fedsim.settings import merged

Integers = np.typing.NDArray[np.int64]
Width = Literal["auto"] | int

DECIDED = {
    "federation.clients": "use --clients",
    "federation.clients_per_round": "use --clients",
    "federation.min_clients": "all clients report",
    "federation.dropout": "all clients report",
    "federation.stragglers": "all clients report",
    "federation.over_sampling": "all clients report",
    "federation.rounds": "use --rounds",
    "runtime.workers": "use --workers",
    "runtime.clients_per_chunk": "use --widths",
    "defense": "use --defenses",
    "data.partition": "use --images",
    "attacks": "it measures no attacks",
    "audit": "it measures no attacks",
    "overhead_pairs": "it measures rounds without a defense, too",
}
"""Settings that the study decides, and what to know instead."""


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the study.

    Attributes:
        clients: Clients a round.
        workers: Worker processes.
        clients_per_chunk: Most clients that are one unit of work.
        defense: Name of the defense.
    """

    clients: int
    workers: int
    clients_per_chunk: int
    defense: str

    @property
    def chunks(self) -> int:
        """Chunks a round."""
        return chunk_count(self.clients, self.clients_per_chunk)

    @property
    def calls(self) -> int:
        """Blocks of chunks, a call of a worker each."""
        return call_count(self.chunks, self.clients_per_chunk, self.workers)

    @property
    def title(self) -> str:
        """The cell in a few characters."""
        return f"c{self.clients}-w{self.workers}-k{self.clients_per_chunk}-{self.defense}"


class ScaleConfig(Schema):
    """What the study measures."""

    experiment: ExperimentConfig = ExperimentConfig(name="scale")
    """The workload: data, model, local training; also name, seed and tracking."""
    clients: tuple[int, ...] = Field(default=(10, 50, 200), min_length=1)
    """Clients a round."""
    workers: tuple[int, ...] = Field(default=(1, 2), min_length=1)
    """Worker processes: strong scaling, with the same cohort for all."""
    widths: tuple[Width, ...] = Field(default=("auto",), min_length=1)
    """Clients a worker trains at once; auto: as in a run."""
    defenses: tuple[str, ...] = Field(default=("none", "graddefense"), min_length=1)
    """Defenses, with their default settings."""
    weak: int = Field(default=50, ge=0)
    """Clients a worker in weak scaling, where the cohort grows with the workers; 0: no weak scaling."""
    actors: tuple[int, ...] = (10,)
    """Cohorts that also run with one actor a client, as far as memory allows."""
    images: int = Field(default=64, ge=1)
    """Images a client holds; clients share images when the data set is too small for all."""
    rounds: int = Field(default=5, ge=1)
    """Measured rounds a cell."""
    warmup: int = Field(default=1, ge=0)
    """Rounds before them that do not count."""
    longest: float = Field(default=120.0, gt=0)
    """Seconds after which the cells of one cohort size start no further round; each gets one at least."""
    nodes: int = Field(default=1, ge=1)
    """Raylets on this machine that the workers are spread over."""
    cluster: tuple[int, ...] = (1, 8, 64, 512)
    """Workers of a cluster whose round time the cost model extrapolates to."""

    @model_validator(mode="after")
    def _positive(self) -> "ScaleConfig":
        for name in ("clients", "workers", "widths", "actors", "cluster"):
            values = getattr(self, name)
            wrong = [value for value in values if value != "auto" and value < 1]
            if wrong:
                raise ValueError(f"{name} must be at least 1, got {wrong[0]}")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names a value twice: {' '.join(map(str, values))}")
        return self

    @property
    def name(self) -> str:
        """Name of the study and of its folder."""
        return self.experiment.name

    def fingerprint(self) -> str:
        """Return a digest of all that is measured; equal digests, equal studies."""
        data = self.model_dump(mode="json", exclude={"experiment", "cluster"})
        text = json.dumps([data, self.experiment.fingerprint()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def cells(self) -> list[Cell]:
        """Return the cells of strong and weak scaling, by cohort size."""
        pairs = {(clients, workers) for clients in self.clients for workers in self.workers}
        pairs |= {(self.weak * workers, workers) for workers in self.workers if self.weak}
        return list(dict.fromkeys(self._cells(sorted(pairs), self.widths)))

    def actor_cells(self) -> list[Cell]:
        """Return the cells with one actor a client, by cohort size."""
        return list(self._cells([(clients, clients) for clients in sorted(self.actors)], [1]))

    def _cells(self, pairs: Sequence[tuple[int, int]], widths: Sequence[Width]) -> Iterator[Cell]:
        for clients, workers in pairs:
            for width in widths:
                for defense in self.defenses:
                    yield Cell(clients, workers, self.chunk_width(clients, width), defense)

    def chunk_width(self, clients: int, width: Width) -> int:
        """Return the clients a chunk of a cohort, given an entry of `widths`."""
        runtime = self.experiment.runtime.model_copy(update={"clients_per_chunk": width})
        experiment = self.experiment.model_copy(update={"runtime": runtime})
        return experiment.chunk_width(clients, local_device())

    def experiment_at(self, cell: Cell) -> ExperimentConfig:
        """Return the simulation behind a cell: its whole population is its cohort."""
        settings = {
            "federation": {"clients": cell.clients, "clients_per_round": cell.clients},
            "defense": {"name": cell.defense},
            "runtime": {"workers": cell.workers, "clients_per_chunk": cell.clients_per_chunk},
        }
        return parse_config(merged(self.experiment.to_dict(), settings), "--defenses")


def parse_scale(options: dict[str, Any], settings: dict[str, Any], source: str) -> ScaleConfig:
    """Check a study's options and the settings of its workload, and return it.

    Args:
        options: Fields of `ScaleConfig` that were given.
        settings: Settings of the experiment, nested.
        source: What the error says the settings come from.

    Raises:
        ConfigError: If anything is wrong, or a setting is given that the study decides.
    """
    for path, instead in DECIDED.items():
        found: Any = settings
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            raise ConfigError(f"{path}: the study decides that; {instead}")
    experiment = parse_config(merged({"name": "scale"}, settings), source)
    data = {"experiment": experiment, **options}
    try:
        config = ScaleConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"scale: {explain(error, data)}") from None
    for cell in config.cells()[: len(config.defenses)]:
        config.experiment_at(cell)
    return config


def shared_partition(indices: Integers, clients: int, images: int, seed: int) -> Partition:
    """Give every client the same number of images, all different; several clients may hold the same image.

    The images are shuffled and cut into clients, and again, until all clients have theirs: so a cohort may be
    larger than the data set allows without a client's work becoming less.

    Args:
        indices: The training images, int64 [n].
        clients: Number of clients.
        images: Images a client.
        seed: Seed of the study.

    Raises:
        ConfigError: If a client would hold more images than there are.
    """
    served = len(indices) // images
    if not served:
        raise ConfigError(f"--images: a client cannot hold {images} of {len(indices):,} images")
    rng = numpy_stream(seed, Purpose.PARTITION)
    deals = [rng.permutation(indices)[: served * images] for _ in range(-(-clients // served))]
    held = np.sort(np.concatenate(deals).reshape(-1, images)[:clients], axis=1)
    return Partition(held.reshape(-1), np.arange(clients + 1) * images)


@dataclass(frozen=True)
class Workload:
    """The sessions of a study's cells on one data set."""

    config: ScaleConfig
    dataset: Dataset

    @cached_property
    def _images(self) -> tuple[Integers, Integers]:
        experiment = self.config.experiment
        return root_set(self.dataset, experiment.federation.root_per_class, experiment.seed)

    @cached_property
    def weights_bytes(self) -> int:
        """Size of the global weights, and about that of a call's sum."""
        config = self.config
        return 4 * self.spec(config.cells()[0]).build_model(self.dataset).layout.dimension

    def spec(self, cell: Cell) -> SessionSpec:
        """Return the session of a cell."""
        root, rest = self._images
        parts = shared_partition(rest, cell.clients, self.config.images, self.config.experiment.seed)
        return SessionSpec(self.config.experiment_at(cell), parts, root)


def describe(cell: Cell) -> dict[str, Any]:
    """Return the cell as the first columns of its row."""
    return {**asdict(cell), "chunks": cell.chunks, "calls": cell.calls}
