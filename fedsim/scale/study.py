"""The scalability study from its plan to its table: cells are kept as soon as they are measured."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import ray
import yaml

from fedsim import environment
from fedsim.data.datasets import load_dataset
from fedsim.engine.runtime import Cluster, check_address, local_cpus
from fedsim.errors import ConfigError
from fedsim.files import check_folder, write_atomically
from fedsim.progress import Reporter
from fedsim.scale.cost_model import Point
from fedsim.scale.grid import Cell, ScaleConfig, Workload, describe
from fedsim.scale.measure import measure, of_cell, started
from fedsim.settings import read_yaml
from fedsim.tracking import TrackedRun, Tracker, resolve_uri

USABLE_MEMORY = 0.8
"""Share of the memory available before the study that its processes may take."""
NODE_BYTES = 300 * 2**20
"""What a Ray node takes for itself: raylet and agents."""


@dataclass
class ScaleStudy:
    """Measures the cells of a study and keeps each as soon as its cohort size is done.

    Attributes:
        config: What is measured.
        root: Output root; the study's folder is `root / name`.
        data_dir: Where data sets lie.
        address: Ray cluster; None: this machine.
        reporter: Told about progress.
        left_out: Cells that memory or the cluster have no room for, each with the reason.
    """

    config: ScaleConfig
    root: Path
    data_dir: Path | None = None
    address: str | None = None
    reporter: Reporter = field(default_factory=Reporter)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Load the data and see that every cell can be run; nothing is started.

        Raises:
            ConfigError: If anything in the input is wrong, or nobody answers at `address`.
        """
        if self.address and self.config.nodes > 1:
            raise ConfigError("--nodes starts nodes on this machine; with --address the cluster has its own")
        if self.address:
            check_address(self.address)
        dataset = load_dataset(self.config.experiment.data, self.data_dir)
        self.workload = Workload(self.config, dataset)
        for cell in self.config.cells()[: len(self.config.defenses)]:
            self.workload.spec(cell).build_model(dataset)

    @property
    def folder(self) -> Path:
        """Where the study is kept."""
        return (self.root / self.config.name).resolve()

    @property
    def table(self) -> pd.DataFrame:
        """The cells measured so far, a row each; empty if there are none."""
        return _read(self.folder / "scale.csv")

    def pending(self) -> list[Cell]:
        """Return the cells that are not measured yet."""
        done = self.table
        planned = dict.fromkeys([*self.config.cells(), *self.config.actor_cells()])
        return [cell for cell in planned if done.empty or of_cell(done, cell).empty]

    def check_output(self, resume: bool) -> None:
        """See that the output folder is free for this study.

        Raises:
            ConfigError: If it holds something else, or this study and `resume` was not asked for.
        """

        def is_same(saved: Path) -> bool:
            return bool(read_yaml(saved).get("fingerprint") == self.config.fingerprint())

        check_folder(self.folder, "scale.yaml", "study", is_same, resume, "--name")

    def run(self, resume: bool = False) -> pd.DataFrame:
        """Measure what is not measured yet; return all rows.

        Raises:
            ConfigError: If the output folder is not free, or Ray or the tracking store cannot be reached.
            RunError: If a round fails; the cohort sizes measured before are kept.
        """
        self.check_output(resume)
        uri, tracking = None, self.config.experiment.tracking
        if tracking.uri != "off":
            uri = resolve_uri(tracking.uri, self.root)
        tracker = Tracker(uri, tracking.experiment, self.root / "mlartifacts") if uri else None
        self._claim()
        parent = self._start(tracker) if tracker else None
        status = "KILLED"
        try:
            self._measure_pending(tracker, parent)
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            if parent:
                self._attach(parent)
                parent.finish(status)
        return self.table

    def _attach(self, parent: TrackedRun) -> None:
        for name in ("scale.csv", "rounds.csv"):
            if (self.folder / name).exists():
                parent.artifact(self.folder / name)

    def _measure_pending(self, tracker: Tracker | None, parent: TrackedRun | None) -> None:
        actors, pending = set(self.config.actor_cells()), self.pending()
        # One actor a client needs many more processes: they are started for these cells alone.
        for part in ([c for c in pending if c not in actors], [c for c in pending if c in actors]):
            fitting = self._fitting(part)
            if not fitting:
                continue
            workers = max(cell.workers for cell in fitting)
            with started(self.config.experiment.runtime, workers, self.address, self.config.nodes) as pool:
                for size, cells in groupby(sorted(fitting), key=lambda cell: cell.clients):
                    group = list(cells)
                    self.reporter.note(f"{size:,} clients: {len(group)} cells")
                    rounds, rows = measure(group, self.workload, pool, self.reporter.note)
                    self._keep(rounds, rows)
                    self._track(rounds, rows, tracker, parent)

    def _fitting(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that there is room for, by the size of one worker; name the others in `left_out`."""
        if not self.address and all(cell.workers <= local_cpus() for cell in cells):
            return list(cells)
        worker, server = self._process_bytes()
        free, cpus = psutil.virtual_memory().available, None
        if self.address:
            with Cluster(self.address):
                resources = ray.cluster_resources()
            free, cpus = int(resources.get("memory", 0)), int(resources.get("CPU", 1))
        room = USABLE_MEMORY * free - server - self.config.nodes * NODE_BYTES
        bound, reason = max(1, int(room / worker)), "memory has room for"
        self.reporter.note(
            f"a worker takes {worker / 2**20:.0f} MiB: {free / 2**30:.1f} GiB available are room for {bound}"
        )
        if cpus is not None and cpus < bound:
            bound, reason = cpus, "the cluster has CPUs for"
        for cell in cells:
            if cell.workers > bound:
                self.left_out.append(f"{cell.title}: {cell.workers} workers, {reason} {bound}")
                self.reporter.note(f"left out: {self.left_out[-1]}")
        return [cell for cell in cells if cell.workers <= bound]

    def _process_bytes(self) -> tuple[float, float]:
        """Return the unique memory of a worker and of the server: the largest measured, or of a trial."""
        if not self.table.empty:
            return float(self.table["worker_bytes_max"].max()), float(self.table["server_bytes"].max())
        widest = max(self.pending(), key=lambda cell: cell.clients_per_chunk)
        few = min(widest.clients, 2 * widest.clients_per_chunk)
        with started(self.config.experiment.runtime, 1, self.address) as pool:
            measure(
                [Cell(few, 1, widest.clients_per_chunk, widest.defense)],
                self._briefly(),
                pool,
                self.reporter.note,
            )
            memory = pool.memory(1)
        return memory["worker_bytes"], memory["server_bytes"]

    def _briefly(self) -> Workload:
        brief = self.config.model_copy(update={"rounds": 1, "warmup": 0})
        return Workload(brief, self.workload.dataset)

    def _claim(self) -> None:
        data = {**self.config.model_dump(mode="json"), "fingerprint": self.config.fingerprint()}
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / "scale.yaml", text.encode())

    def _keep(self, rounds: pd.DataFrame, rows: list[dict[str, Any]]) -> None:
        # The cells' rows come last: what has one is done.
        cell = [one.name for one in fields(Cell)]
        for name, new, key in (
            ("rounds.csv", rounds, [*cell, "round"]),
            ("scale.csv", pd.DataFrame(rows), cell),
        ):
            whole = pd.concat([_read(self.folder / name), new]).drop_duplicates(key, keep="last")
            write_atomically(self.folder / name, whole.to_csv(index=False, float_format="%.9g").encode())

    def _identity(self, what: str) -> str:
        return f"{self.config.fingerprint()[:16]}{what}@{self.folder}"

    def _start(self, tracker: Tracker) -> TrackedRun:
        tags = {"fedsim.kind": "scale", "fedsim.name": self.config.name, "fedsim.id": self._identity("")}
        facts = {f"version.{k}": v for k, v in environment.versions().items()}
        facts |= {f"hardware.{k}": v for k, v in environment.hardware().items()}
        parent = tracker.start(self.config.name, tags | facts)
        parent.artifact(self.folder / "scale.yaml")
        return parent

    def _track(
        self,
        rounds: pd.DataFrame,
        rows: list[dict[str, Any]],
        tracker: Tracker | None,
        parent: TrackedRun | None,
    ) -> None:
        """Log a child run a cell: its settings, its round times, and its row as final figures."""
        if not (tracker and parent):
            return
        for row in rows:
            cell = Cell(*(row[name] for name in ("clients", "workers", "clients_per_chunk", "defense")))
            tags = {"fedsim.kind": "scale_cell", "fedsim.defense": cell.defense}
            run = tracker.start(cell.title, {**tags, "fedsim.id": self._identity(cell.title)}, parent)
            run.params(describe(cell))
            for _, one in of_cell(rounds, cell).iterrows():
                run.metrics({"round_seconds": one["seconds"]}, int(one["round"]))
            figures = {k: v for k, v in row.items() if k not in describe(cell) and not pd.isna(v)}
            run.metrics(figures, 0)
            run.finish()


def points(table: pd.DataFrame, config: ScaleConfig) -> dict[str, list[Point]]:
    """Return what the cost model is fitted on, by defense: all cells but those of one actor a client."""
    found: dict[str, list[Point]] = {defense: [] for defense in config.defenses}
    for cell in config.cells():
        rows = table if table.empty else of_cell(table, cell)
        for _, row in rows.iterrows():
            side = min(cell.workers, int(row["cores"]))
            found[cell.defense].append(Point(cell.clients, side, cell.clients_per_chunk, float(row["seconds"])))
    return found


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(path.read_bytes())) if path.exists() else pd.DataFrame()
