"""The whole command on Ray: one sweep that is killed, resumed, and read back from MLflow."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from tests.sweep.sweeps import EXPERIMENT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
SWEEP: dict[str, Any] = {
    "name": "tiny",
    "experiment": EXPERIMENT,
    "space": {
        "defense": {
            "grid": [
                {"name": "none"},
                {"name": "custom", "factory": "tests.test_simulation:Poison"},
                {"name": "gc", "prune": {"grid": [0.5, 0.9]}},
            ]
        }
    },
    "objectives": {"ACC": "max", "PSNR": "min"},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the sweep in it."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SWEEP))
    return tmp_path


def command(place: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "fedsim",
        "sweep",
        str(place / "tiny.yaml"),
        "--output",
        str(place / "out"),
        *more,
    ]


def environment(temporary: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": temporary}


def wait_for(done: Any, process: "subprocess.Popen[str]", seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not done() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def kill(processes: list[psutil.Process]) -> None:
    """End what a killed driver leaves behind for a while, at once: as if the machine were gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_killed_sweep_resumes_without_repeating_anything(place: Path) -> None:
    temporary = tempfile.mkdtemp(prefix="fs", dir="/tmp")
    trials = place / "out" / "tiny" / "trials"
    process = subprocess.Popen(command(place), env=environment(temporary), stderr=subprocess.PIPE, text=True)
    children: list[psutil.Process] = []
    try:
        wait_for((trials / "0000" / "outcome.json").exists, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kill(children)
        stamp = (trials / "0000" / "result.json").stat().st_mtime_ns

        refused = subprocess.run(command(place), env=environment(temporary), capture_output=True, text=True)
        assert refused.returncode == 2
        assert "--resume goes on with it" in refused.stderr
        resumed = subprocess.run(
            command(place, "--resume"), env=environment(temporary), capture_output=True, text=True
        )
    finally:
        kill(children)
        shutil.rmtree(temporary)
    assert resumed.returncode == 1, "a failed trial is told by the exit code"
    assert "failed: trial 0001" in resumed.stdout
    assert "not finite" in resumed.stdout
    assert (trials / "0000" / "result.json").stat().st_mtime_ns == stamp
    assert not (place / "out" / "tiny" / "tune").exists()
    _check_files(place / "out" / "tiny")
    _check_mlflow(place / "out")


def _check_files(folder: Path) -> None:
    frame = pd.read_csv(folder / "trials.csv", dtype={"trial": str})
    assert list(frame["trial"]) == ["0000", "0001", "0002", "0003"]
    assert list(frame["state"]) == ["done", "failed", "done", "done"]
    found = json.loads((folder / "summary.json").read_text())
    assert found["trials"] == {"done": 3, "stopped": 0, "failed": 1}
    assert {best["point"] for best in found["best"]} <= {0, 2, 3}
    result = json.loads((folder / "trials" / "0002" / "result.json").read_text())
    assert result["ACC"] == frame["ACC"][2]


def _check_mlflow(out: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("fedsim").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["fedsim.kind"] == "sweep"]
    trials = {run.data.tags["fedsim.trial"]: run for run in runs if run.data.tags["fedsim.kind"] == "trial"}
    assert len(trials) == len(runs) - 1 == 4, "a resume makes no second run"
    assert parent.data.tags["fedsim.name"] == "tiny"
    for title, run in trials.items():
        tags = run.data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert (tags["fedsim.sweep"], tags["fedsim.dataset"], tags["fedsim.seed"]) == ("tiny", "digits", "0")
        assert tags["fedsim.defense"] == ("none", "custom", "gc", "gc")[int(title)]
        assert tags["fedsim.point"] == str(int(title))
        failed = title == "0001"
        assert run.info.status == ("FAILED" if failed else "FINISHED")
        assert ("fedsim.reason" in tags) == failed
        if not failed:
            assert {"ACC", "ART", "PSNR", "SSIM"} <= set(run.data.metrics)
            assert len(client.get_metric_history(run.info.run_id, "loss")) == 4
            assert run.data.params["federation.rounds"] == "4"
    assert trials["0002"].data.params["defense.prune"] == "0.5"
