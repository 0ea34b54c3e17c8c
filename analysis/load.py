"""Read one comparison back from MLflow, which is all that tables, figures and the report ever see."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import yaml

from analysis.frames import KEY, CellKey, frames
from analysis.names import ordered_columns, ordered_datasets
from fedsim.errors import ConfigError
from fedsim.results import audit_stem

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@dataclass(frozen=True)
class Comparison:
    """What MLflow holds of a comparison.

    Attributes:
        name: The comparison's name.
        run_id: Its MLflow run, the parent of its cells.
        tracking_uri: The store that it was read from.
        started: When it was started.
        config: Its resolved configuration, as YAML text; empty when none was logged.
        cells: One row a finished cell: `KEY`, `run_id`, `artifacts` (their address), `test_images` (size of the
            test set), ACC (0–1), ART (s), rounds, `upload_bytes`, and the ART overhead over no defense
            (`overhead` and its quartiles `overhead_low`, `overhead_high`; fractions), `overhead_pairs`.
        images: One row a reconstructed image, in the order of its `.npz`: `KEY`, `frames.IMAGE_COLUMNS` and
            `column` (that of the tables which it counts in; empty when it counts in none).
        rounds: One row a round of a cell: `KEY` and the columns of `rounds.csv`.
        floors: One row a cell and guess that knows nothing: `KEY`, `guess`, PSNR, SSIM.
        results: `result.json` of each cell.
        configs: `config.yaml` of each cell, as text.
        unreadable: Finished runs that could not be read, each with the reason.
    """

    name: str
    run_id: str
    tracking_uri: str
    started: datetime
    config: str
    cells: pd.DataFrame
    images: pd.DataFrame
    rounds: pd.DataFrame
    floors: pd.DataFrame
    results: dict[CellKey, dict[str, Any]]
    configs: dict[CellKey, str]
    unreadable: tuple[str, ...] = ()

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Pairs of table and data set that have at least one cell, in the slides' order."""
        tables = sorted(self.cells["table"].unique())
        return [(t, d) for t in tables for d in ordered_datasets(self.part(self.cells, t)["dataset"])]

    @property
    def columns(self) -> list[str]:
        """Columns of the tables that have at least one cell, in the slides' order, no defense included."""
        return ordered_columns({*self.cells["defense"], *self.images["column"]} - {""})

    @property
    def missing(self) -> list[CellKey]:
        """Cells that the comparison's configuration plans and that have not finished."""
        planned = parsed(self.config)
        axes = [planned.get(name) or [] for name in ("tables", "datasets", "defenses", "seeds")]
        return [key for names in product(*axes) if (key := CellKey(*names)) not in self.results]

    @staticmethod
    def part(frame: pd.DataFrame, table: str, dataset: str | None = None) -> pd.DataFrame:
        """Return the rows of one table, or of one data set in it."""
        rows = frame[frame["table"] == table]
        return rows if dataset is None else rows[rows["dataset"] == dataset]

    def reconstructions(
        self, key: CellKey, attack: str, adversary: str, round_index: int, strategy: str = ""
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return originals and reconstructions, uint8 [N·B, C, H, W] each, in audit order; None if not logged."""
        folder = str(self.cells.set_index(KEY).loc[tuple(key), "artifacts"])
        name = f"reconstructions/{audit_stem(attack, adversary, strategy, round_index)}.npz"
        data = artifact(self.tracking_uri, folder, name)
        if data is None:
            return None
        with np.load(io.BytesIO(data)) as arrays:
            pair = (arrays["originals"], arrays["reconstructions"])
        originals, found = (images.reshape(-1, *images.shape[2:]) for images in pair)
        return originals, found


def load_comparison(tracking_uri: str, name: str | None = None) -> Comparison:
    """Read the newest comparison of that name (of all, without a name), or the one whose parent run has that id.

    Raises:
        ConfigError: If the store cannot be read, or holds no such comparison (the names that it holds are listed).
    """
    client, comparisons = open_store(tracking_uri, "comparison")
    parent = find_parent(comparisons, tracking_uri, name, "comparison")
    runs = _children(client, parent)
    loaded: dict[CellKey, dict[str, Any]] = {}
    unreadable = []
    for run in runs:
        try:
            key, cell = _read_cell(tracking_uri, run)
        except (OSError, ValueError, KeyError) as error:
            unreadable.append(f"run {run.info.run_id}: {type(error).__name__}: {error}")
        else:
            loaded[key] = cell
    if not loaded:
        reason = f" ({unreadable[0]})" if unreadable else ""
        title = parent.data.tags.get("fedsim.name", parent.info.run_id)
        raise ConfigError(f"comparison {title!r} has no finished cell yet{reason}")
    config = artifact(tracking_uri, parent.info.artifact_uri, "comparison.yaml")
    return Comparison(
        name=parent.data.tags.get("fedsim.name", parent.info.run_name),
        run_id=parent.info.run_id,
        tracking_uri=tracking_uri,
        started=datetime.fromtimestamp(parent.info.start_time / 1000, UTC),
        config=config.decode("utf-8") if config else "",
        **frames(loaded),
        results={key: cell["result"] for key, cell in loaded.items()},
        configs={key: cell["config"] for key, cell in loaded.items()},
        unreadable=tuple(unreadable),
    )


def kind_of(tracking_uri: str, name: str | None) -> str:
    """Return whether a name (None: the newest of all) is that of a `comparison` or of a `sweep`.

    Raises:
        ConfigError: If the store cannot be read or holds no such run.
    """
    runs = [run for kind in ("comparison", "sweep") for run in open_store(tracking_uri, kind)[1]]
    newest = sorted(runs, key=lambda run: -run.info.start_time)
    return str(find_parent(newest, tracking_uri, name, "comparison or sweep").data.tags["fedsim.kind"])


def open_store(tracking_uri: str, kind: str) -> tuple[Any, list[Any]]:
    """Return a client, and the parent runs of a kind (`comparison`, `sweep`), newest first.

    Raises:
        ConfigError: If the store cannot be read.
    """
    # Creating a client on a missing SQLite file would leave an empty database behind.
    path = Path(tracking_uri.split(":///", 1)[1].split("?")[0]) if tracking_uri.startswith("sqlite:///") else None
    if path is not None and not path.exists():
        raise ConfigError(f"there is no tracking database at {path}")
    # A wrong address should be told in seconds, not after MLflow's many minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return client, list(search_runs(client, experiments, f"tags.`fedsim.kind` = '{kind}'"))
    except Exception as error:  # MLflow raises whatever its store's driver raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot read the tracking store at {tracking_uri}: {reason}") from error


def find_parent(runs: list[Any], tracking_uri: str, name: str | None, kind: str) -> Any:
    """Return the newest of `runs` with that name or id; ConfigError lists those that there are."""
    for run in runs:
        if name is None or name in (run.info.run_id, run.data.tags.get("fedsim.name")):
            return run
    names = sorted({run.data.tags.get("fedsim.name", run.info.run_id) for run in runs})
    known = f"it holds: {', '.join(names)}" if names else "it holds none"
    wanted = kind if name is None else f"{kind} named {name!r}"
    raise ConfigError(f"no {wanted} in {tracking_uri}; {known}")


def _children(client: Any, parent: Any) -> list[Any]:
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and attributes.status = 'FINISHED'"
    runs = search_runs(client, [parent.info.experiment_id], query)
    # Oldest first, so that a cell that was run again replaces its former result.
    return [run for run in reversed(list(runs)) if run.data.tags.get("fedsim.kind") == "cell"]


def search_runs(client: Any, experiments: list[str], query: str) -> Iterator[Any]:
    """Yield all runs that match a query, newest first."""
    token = None
    while True:
        page = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def artifact(tracking_uri: str, folder: str, name: str) -> bytes | None:
    """Return a run's file by its own address (by the run's id, MLflow asks the database four times a file)."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with TemporaryDirectory() as scratch:
        try:
            path = download_artifacts(artifact_uri=f"{folder}/{name}", dst_path=scratch, tracking_uri=tracking_uri)
            return Path(path).read_bytes()
        except (OSError, MlflowException):
            return None


def _read_cell(tracking_uri: str, run: Any) -> tuple[CellKey, dict[str, Any]]:
    tags = run.data.tags
    key = CellKey(tags["fedsim.table"], tags["fedsim.dataset"], tags["fedsim.defense"], int(tags["fedsim.seed"]))
    names = ("result.json", "rounds.csv", "config.yaml")
    result, rounds, config = (artifact(tracking_uri, run.info.artifact_uri, name) for name in names)
    if result is None:
        raise FileNotFoundError(f"{key} has no result.json")
    summary = json.loads(result)
    float(summary["ACC"])
    return key, {
        "run_id": run.info.run_id,
        "artifacts": run.info.artifact_uri,
        "test_images": _test_images(run),
        "result": summary,
        "rounds": pd.read_csv(io.BytesIO(rounds)) if rounds else pd.DataFrame(),
        "config": config.decode("utf-8") if config else "",
    }


def _test_images(run: Any) -> int | None:
    """Return the size of the test set, which the tracker notes in the profile of the run's data set."""
    for used in run.inputs.dataset_inputs if run.inputs else ():
        profile = json.loads(used.dataset.profile or "{}")
        if "test" in profile:
            return int(profile["test"])
    return None


def parsed(config: str) -> dict[str, Any]:
    """Return a YAML configuration as a mapping; empty when there is none."""
    return yaml.safe_load(config) or {}
