"""A comparison: data sets × attacks × defenses × seeds, one simulation a cell, on one Ray runtime."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fedsim.comparison_config import Cell, ComparisonConfig, parse_comparison
from fedsim.config import ExperimentConfig
from fedsim.data.datasets import Dataset, dataset_key, load_dataset
from fedsim.engine.runtime import Runtime
from fedsim.errors import RunError
from fedsim.files import check_folder, write_atomically
from fedsim.preparation import Prepared, prepare
from fedsim.progress import Reporter
from fedsim.results import SimulationResult
from fedsim.settings import read_yaml
from fedsim.simulation import Simulation
from fedsim.tracking import TrackedRun, Tracker, check_store, resolve_uri


@dataclass
class Comparison:
    """Runs the cells one after the other and keeps each as soon as it is done.

    Attributes:
        config: The cells.
        root: Output root; the comparison's folder is `root / name`.
        data_dir: Where data sets lie.
        address: Ray cluster; None: this machine.
        reporter: Told about progress.
    """

    config: ComparisonConfig
    root: Path
    data_dir: Path | None = None
    address: str | None = None
    reporter: Reporter = field(default_factory=Reporter)
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every cell and load the data; nothing is started.

        Raises:
            ConfigError: If anything in the input is wrong.
        """
        self.cells = self.config.cells()
        self._datasets: dict[str, Dataset] = {}
        for cell in self.cells:
            self._prepare(cell)

    def _prepare(self, cell: Cell) -> Prepared:
        return prepare(cell.config, self.dataset(cell.config), self.data_dir)

    @property
    def folder(self) -> Path:
        """Where the comparison is kept."""
        return self.root / self.config.name

    @property
    def tracking_uri(self) -> str:
        """MLflow's store."""
        return resolve_uri(self.config.tracking.uri, self.root)

    def dataset(self, config: ExperimentConfig) -> Dataset:
        """Return the data of an experiment, loaded once."""
        key = dataset_key(config.data)
        if key not in self._datasets:
            self._datasets[key] = load_dataset(config.data, self.data_dir)
        return self._datasets[key]

    def by_dataset(self) -> dict[str, Prepared]:
        """Return the data and partition of the first cell of each data set."""
        first = {cell.dataset: cell for cell in reversed(self.cells)}
        return {name: self._prepare(cell) for name, cell in first.items()}

    def run(self, resume: bool = False) -> Iterator[tuple[Cell, SimulationResult]]:
        """Run the cells; yield each with its result. Cells that fail are named in `failures`, the rest go on.

        Raises:
            ConfigError: If the folder holds another comparison, or this one and `resume` is false; if the
                tracking store or the Ray cluster cannot be reached.
        """
        self._check_folder(resume)
        check_store(self.tracking_uri)
        with Runtime(self.config.runtime, self.address) as runtime:
            # Only now: to import MLflow takes as long as the workers take to start.
            tracker = Tracker(self.tracking_uri, self.config.tracking.experiment, self.root / "mlartifacts")
            parent = self._start(tracker)
            status = "FAILED"
            try:
                for number, cell in enumerate(self.cells):
                    self.reporter.note(f"cell {number + 1} of {len(self.cells)}: {cell.config.name}")
                    result = self._run_cell(cell, runtime, tracker, parent)
                    if result:
                        yield cell, result
                status = "FAILED" if self.failures else "FINISHED"
            except (KeyboardInterrupt, GeneratorExit):
                status = "KILLED"
                raise
            finally:
                parent.finish(status)

    def _run_cell(
        self, cell: Cell, runtime: Runtime, tracker: Tracker, parent: TrackedRun
    ) -> SimulationResult | None:
        simulation = Simulation(
            cell.config,
            output=self.folder / "cells" / cell.config.name,
            data_dir=self.data_dir,
            dataset=self.dataset(cell.config),
            runtime=runtime,
            tracker=tracker,
            parent=parent,
            tags={
                "fedsim.kind": "cell",
                "fedsim.table": cell.table,
                "fedsim.dataset": cell.dataset,
                "fedsim.defense": cell.defense,
                "fedsim.seed": str(cell.seed),
            },
            reporter=self.reporter,
        )
        try:
            return simulation.run(resume=True)
        except RunError as error:
            self.failures[cell.config.name] = str(error)
            self.reporter.note(f"cell {cell.config.name} failed: {error}")
            return None

    def _start(self, tracker: Tracker) -> TrackedRun:
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / "comparison.yaml", text.encode())
        identity = f"{self.config.fingerprint()[:16]}@{self.folder.resolve()}"
        tags = {"fedsim.kind": "comparison", "fedsim.name": self.config.name, "fedsim.id": identity}
        parent = tracker.start(self.config.name, tags)
        parent.artifact(self.folder / "comparison.yaml")
        return parent

    def _check_folder(self, resume: bool) -> None:
        def is_same(saved: Path) -> bool:
            return parse_comparison(read_yaml(saved), str(saved)).fingerprint() == self.config.fingerprint()

        check_folder(self.folder, "comparison.yaml", "comparison", is_same, resume, "--name")
