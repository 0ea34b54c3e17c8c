"""MLflow, written through one client: a run a simulation, one batch of metrics at a time."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from fedsim.data.datasets import Dataset
from fedsim.errors import ConfigError, RunError
from fedsim.reachable import check_reachable

if TYPE_CHECKING:
    from fedsim.results import RunFolder, SimulationResult

T = TypeVar("T")
PARAM_LIMIT = 6000
METRICS_PER_BATCH = 900
PATIENCE_SECONDS = 600
"""How long a write that cannot wait is tried again while MLflow is away."""
RETRY_SECONDS = 5
"""Least time between two tries."""
PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "PERMISSION_DENIED")
"""MLflow's error codes that no waiting cures."""

log = logging.getLogger("fedsim")


def resolve_uri(uri: str, root: Path) -> str:
    """Return the tracking URI that `uri` stands for.

    `auto` is the environment's MLFLOW_TRACKING_URI, as on a cluster, or else SQLite in the output root.
    """
    if uri == "auto":
        uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    if uri != "auto":
        return uri
    root.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{root.resolve()}/mlflow.db"


def check_store(uri: str) -> None:
    """See that somebody listens where an HTTP store should be, which is told at once; MLflow would try for long.

    Raises:
        ConfigError: If nobody does.
    """
    address = urlsplit(uri)
    if address.scheme not in ("http", "https") or address.scheme in getproxies():
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    check_reachable(address.hostname or "", port, f"tracking.uri: no MLflow store at {uri}")


def patiently(write: Callable[[], T], patience: float | None = None) -> T:
    """Return what `write` returns, trying again while MLflow is away.

    Args:
        write: A write that may be repeated.
        patience: Seconds to try; None: `PATIENCE_SECONDS`.

    Raises:
        RunError: If MLflow did not come back in time, or refused.
    """
    deadline = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience)
    while True:
        try:
            return write()
        except Exception as error:  # MLflow raises whatever its store's driver raises
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if getattr(error, "error_code", None) in PERMANENT or time.monotonic() > deadline:
                raise RunError(f"MLflow: {reason}") from error
            log.warning("MLflow does not answer (%s); trying again", reason)
            time.sleep(RETRY_SECONDS)


class Tracker:
    """Writes to one MLflow experiment; every process but the driver leaves MLflow alone."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        """Open the store at `uri`, creating the database and the experiment when they are not there.

        Args:
            uri: Tracking URI.
            experiment: Name of the experiment.
            artifacts: Folder of a new experiment's artifacts; None leaves it to the server.

        Raises:
            ConfigError: If the store cannot be reached.
        """
        self.uri, self.remote = uri, urlsplit(uri).scheme in ("http", "https")
        # A wrong address should be told in seconds, not after MLflow's many minutes of retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient

        for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)

        try:
            self.client = MlflowClient(uri)
            found = self.client.get_experiment_by_name(experiment)
            location = artifacts.resolve().as_uri() if artifacts and uri.startswith("sqlite") else None
            self.experiment_id = (
                found.experiment_id if found else self.client.create_experiment(experiment, location)
            )
        except Exception as error:  # MLflow raises whatever its store's driver raises
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"tracking.uri: no MLflow store at {uri}: {reason}") from error

    def start(self, name: str, tags: Mapping[str, str], parent: "TrackedRun | None" = None) -> "TrackedRun":
        """Start a run, or go on with an unfinished one that has the same identity.

        The identity is the tag `fedsim.id`: a run found by it is continued, so that a resume makes no second.
        """
        return patiently(lambda: self._start(name, tags, parent))

    def _start(self, name: str, tags: Mapping[str, str], parent: "TrackedRun | None") -> "TrackedRun":
        existing = self._find(tags["fedsim.id"])
        if existing:
            run_id = existing.info.run_id
            self.client.update_run(run_id, status="RUNNING")
            done = [metric.step for metric in self.client.get_metric_history(run_id, "loss")]
            return TrackedRun(self, run_id, rounds_logged=max(done, default=-1) + 1)
        all_tags = {**tags, "mlflow.runName": name}
        if parent:
            all_tags["mlflow.parentRunId"] = parent.run_id
        return TrackedRun(
            self, self.client.create_run(self.experiment_id, tags=all_tags, run_name=name).info.run_id
        )

    def has_finished(self, identity: str) -> bool:
        """Return whether the run with this identity was logged to its end."""
        run = self._find(identity)
        return run is not None and run.info.status == "FINISHED"

    def _find(self, identity: str) -> Any:
        found = self.client.search_runs([self.experiment_id], f"tags.`fedsim.id` = '{identity}'", max_results=1)
        return found[0] if found else None


class TrackedRun:
    """One MLflow run.

    Metrics of rounds go to a server while the next rounds run; a file is written at once, because that takes the
    driver's own time either way. While MLflow is away they wait in memory; all else is tried again with patience.
    """

    def __init__(self, tracker: Tracker, run_id: str, rounds_logged: int = 0) -> None:
        """Wrap the run `run_id`, whose first `rounds_logged` rounds are there already."""
        self.client, self.run_id, self._rounds_logged = tracker.client, run_id, rounds_logged
        self._buffer: list[tuple[str, float, int, int]] = []
        self._next_try = 0.0
        self._remote = tracker.remote
        self._writing = threading.Lock()

    def params(self, nested: Mapping[str, Any]) -> None:
        """Log settings under their dotted paths; those already logged are left alone."""
        from mlflow.entities import Param

        known = patiently(lambda: self.client.get_run(self.run_id)).data.params
        flat = {name: str(value)[:PARAM_LIMIT] for name, value in flatten(nested).items()}
        new = [Param(name, value) for name, value in flat.items() if name not in known]
        for at in range(0, len(new), 100):
            self._write(params=new[at : at + 100])

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self._write(tags=[RunTag(name, value) for name, value in tags.items()])

    def _write(self, **batch: Any) -> None:
        patiently(lambda: self.client.log_batch(self.run_id, **batch))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Note a round's metrics; `flush` writes them."""
        # The time is taken now: a batch that is sent twice is then the same rows, which MLflow keeps once.
        now = int(time.time() * 1000)
        self._buffer += [(name, float(value), now, step) for name, value in values.items()]

    def round(self, record: Mapping[str, Any]) -> None:
        """Log a round's record, unless it is there; a batch is written whenever the model was evaluated."""
        if record["round"] < self._rounds_logged:
            return
        names = {"ACC", "test_loss", "loss", "seconds", "upload_bytes", "clients"}
        names |= {"clients_dropped", "clients_late", "late_bytes", "simulated_seconds"}
        values = {name: record[name] for name in names if record.get(name) is not None}
        self.metrics({**values, "rejected": record["clients_rejected"]}, record["round"])
        if "ACC" in record and time.monotonic() >= self._next_try and not self._writing.locked():
            if self._remote:
                threading.Thread(target=self._try_flush, daemon=True).start()
            else:
                self._try_flush()

    def _try_flush(self) -> None:
        """Write the noted metrics if MLflow is there; else keep them for a later try."""
        try:
            self.flush(patience=0)
        except RunError as error:
            log.warning("%s; the metrics are kept and sent later", error)
            self._next_try = time.monotonic() + RETRY_SECONDS

    def result(self, result: "SimulationResult", folder: "RunFolder | None") -> None:
        """Log the final figures, versions and hardware, and the files of the run."""
        summary = result.summary
        final = {"ACC": summary["ACC"], "ART": summary["ART"], "upload_bytes_mean": summary["upload_bytes"]}
        for audit in result.audits:
            prefix = "" if len(result.audits) == 1 else f"{audit.stem}."
            final |= {f"{prefix}{metric}": audit.mean(metric) for metric in ("PSNR", "SSIM")}
        if summary["overhead"]:
            final["ART_overhead"] = summary["overhead"]["median"]
        final |= {f"participation.{name}": total for name, total in (summary.get("participation") or {}).items()}
        final |= {f"faults.{name}": count for name, count in summary["faults"].items()}
        self.metrics(final, summary["rounds"])
        names = ("execution", "transport", "model_sha256")
        facts = {f"fedsim.{name}": summary[name] for name in names if name in summary}
        facts |= {f"version.{k}": v for k, v in summary["versions"].items()}
        facts |= {f"hardware.{k}": v for k, v in summary["hardware"].items()}
        self.tags(facts)
        if folder:
            for name in ("config.yaml", "result.json", "rounds.csv"):
                self.artifact(folder.path / name)
            if folder.reconstructions.exists():
                self.artifact(folder.reconstructions, "reconstructions")

    def flush(self, patience: float | None = None) -> None:
        """Write the noted metrics in batches; what could not be written stays noted.

        Raises:
            RunError: If MLflow stays away for `patience` seconds.
        """
        from mlflow.entities import Metric

        with self._writing:
            while self._buffer:
                rows = [Metric(*row) for row in self._buffer[:METRICS_PER_BATCH]]
                patiently(lambda rows=rows: self.client.log_batch(self.run_id, metrics=rows), patience)  # type: ignore[misc]
                del self._buffer[: len(rows)]

    def dataset(self, dataset: Dataset, source: str) -> None:
        """Log which data set the run used, by name, digest and size."""
        from mlflow.entities import Dataset as DatasetEntity
        from mlflow.entities import DatasetInput, InputTag

        entity = DatasetEntity(
            name=dataset.name,
            digest=dataset.fingerprint[:36],
            source_type="local",
            source=source,
            profile=f'{{"train": {len(dataset.train_labels)}, "test": {len(dataset.test_labels)}}}',
        )
        tag = InputTag("mlflow.data.context", "training")
        inputs = [DatasetInput(entity, [tag])]
        patiently(lambda: self.client.log_inputs(self.run_id, datasets=inputs))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or all files of a folder."""
        store = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        patiently(lambda: store(self.run_id, str(path), folder))

    def finish(self, status: str = "FINISHED", patience: float | None = None) -> None:
        """Write what is noted and end the run as FINISHED, FAILED or KILLED.

        Raises:
            RunError: If MLflow stays away for `patience` seconds.
        """
        self.flush(patience)
        patiently(lambda: self.client.set_terminated(self.run_id, status), patience)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into dotted names; lists of settings get their index as a name."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        path = f"{prefix}{name}"
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat
