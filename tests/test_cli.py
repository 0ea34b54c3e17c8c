import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray
import yaml

from fedsim.cli import run

TINY = {
    "name": "tiny",
    "datasets": ["digits"],
    "seeds": [0],
    "experiment": {
        "federation": {"rounds": 4, "clients": 20, "clients_per_round": 6, "evaluate_every": 2},
        "audit": {"victims": 2, "victims_per_shard": 1},
        "checkpoint_every": 2,
        "overhead_pairs": 1,
    },
    "tables": {
        "dga": {"attack": {"name": "dlg"}},
        "gia": {"attack": {"name": "gia", "iterations": 30}, "experiment": {"model": {"name": "lenet4"}}},
    },
    "defenses": {"none": {"name": "none"}, "pld": {"name": "pld", "prune": 0.6}},
    "muted": {"pld": ["fc.*"]},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused; return its one line."""
    try:
        code = run(arguments)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["run", "defense.name=nonsense"], "unknown name 'nonsense'"),
        (["run", "missing.yaml"], "cannot be read"),
        (["run", "a.yaml", "b.yaml"], "one config file at most"),
        (["run", "federation.clients=2000"], "2000 clients"),
        (["run", "data={name: digits, partition: {name: shards, classes_per_client: 11}}"], "partition"),
        (["run", "model={name: custom, factory: nowhere:f}"], "cannot import"),
        (["run", "--address", "127.0.0.1:1", "federation.rounds=1"], "no Ray runtime at 127.0.0.1:1"),
        (["run", "tracking.uri=http://127.0.0.1:1"], "no MLflow store at http://127.0.0.1:1"),
        (["run", "data.name=mnist", "--data-dir", "/nonexistent"], "mnist"),
        (["compare", "--preset", "quikc"], "did you mean 'quick'"),
        (["compare", "--defense", "gcc"], "did you mean 'gc'"),
        (["compare", "--dataset", "mnits"], "did you mean 'mnist'"),
        (["compare", "--attack", "dlg"], "dga"),
        (["compare", "--seeds", "0"], "--seeds: at least 1"),
        (["compare", "--seeds", "-2"], "--seeds: at least 1"),
        (["compare", "--name", "../x", "--dry-run"], "--name: letters"),
        (["run", "federation.min_clients=20"], "min_clients is 20, but clients_per_round is 10"),
        (["run", "--dry-run", "defense={name: custom, factory: json:nope}"], "no attribute 'nope'"),
        (["run", "--dry-run", "attacks=[{name: custom, factory: json:nope}]"], "no attribute 'nope'"),
        (["run", "--output", "/dev/null"], "/dev/null is no folder"),
        (["compare", "--output", "/dev/null"], "/dev/null is no folder"),
        (["ui", "--port", "99999"], "--port: between 1 and 65535"),
        (["list", "defence"], "did you mean 'defenses'"),
        (["tables", "--output", "/nonexistent"], "no results here yet"),
        (["frobnicate"], "invalid choice"),
        (["compare", "--bogus"], "--bogus"),
    ],
)
def test_bad_input_gets_one_line_and_code_2_before_anything_starts(
    arguments: list[str],
    fragment: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fragment in fails(arguments, capsys)
    assert not (tmp_path / "runs" / "simulation").exists()


@pytest.mark.ray
def test_a_store_that_cannot_be_opened_gets_one_line_and_code_2_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is opened while the workers start; they are gone again, and no folder is claimed."""
    before, store = ray.is_initialized(), f"sqlite:///{tmp_path}/no/folder/mlflow.db"
    (tmp_path / "no").write_text("a file where MLflow needs a folder")
    arguments = ["run", "--output", str(tmp_path / "out"), f"tracking.uri={store}"]
    assert f"no MLflow store at {store}" in fails(arguments, capsys)
    assert ray.is_initialized() == before and not (tmp_path / "out").exists()


def test_dry_runs_print_the_plan_and_start_nothing(
    tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["compare", "--preset", str(tiny), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "4 cells, 16 rounds, 12 reconstructions" in capsys.readouterr().out
    assert run(["run", "federation.rounds=3", "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["federation"]["rounds"] == 3
    assert not (tmp_path / "out").exists()


def test_list_and_validate(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 0
    assert "graddefense" in capsys.readouterr().out
    assert run(["list", "attacks"]) == 0
    assert "restarts" in capsys.readouterr().out
    assert run(["validate", str(tiny)]) == 0
    assert "a valid comparison of 4 cells" in capsys.readouterr().out
    sweep = tiny.with_name("sweep.yaml")
    sweep.write_text("{name: s, space: {federation.rounds: {grid: [1, 2]}}}")
    assert run(["validate", str(sweep)]) == 0
    assert "a valid sweep, s" in capsys.readouterr().out
    sweep.write_text("{name: s, space: {federation.rounds: {grid: [1, 0]}}}")
    assert "federation.rounds" in fails(["validate", str(sweep)], capsys)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_comparison_keeps_its_cells_and_resumes_the_rest(tiny: Path, tmp_path: Path) -> None:
    """The whole command, killed by Ctrl-C after its first cell, then resumed; every file and figure is there."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedsim", "compare", "--preset", str(tiny), "--output", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = out / "tiny" / "cells" / "dga-digits-none-seed0" / "result.json"
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 200
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    stamp = first.stat().st_mtime_ns

    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == stamp
    _check_output(out, done.stdout)


def _check_output(out: Path, printed: str) -> None:
    folder = out / "tiny"
    for name in ("table_dga.md", "table_dga.tex", "table_dga.csv", "table_gia.md", "images.csv", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert "PLD" in printed
    images = pd.read_csv(folder / "images.csv")
    assert len(images) == 2 * (1 + 2) * 2
    cell = folder / "cells" / "gia-digits-pld-seed0"
    result = json.loads((cell / "result.json").read_text())
    assert {a["attack"] for a in result["audits"]} == {"gia", "pld_muted"}
    assert result["overhead"]["pairs"] == 1
    assert (cell / "reconstructions" / "gia-naive-r0.png").exists()
    assert len(pd.read_csv(cell / "rounds.csv")) == 4
    _check_mlflow(out)


def _check_mlflow(out: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("fedsim")
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if r.data.tags["fedsim.kind"] == "comparison"]
    cells = [r for r in runs if r.data.tags["fedsim.kind"] == "cell"]
    assert len(parents) == 1
    assert len(cells) == 4, "a resume makes no second run"
    assert {r.info.status for r in runs} == {"FINISHED"}
    for cell in cells:
        assert cell.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert {"ACC", "ART"} <= set(cell.data.metrics)
        assert len(client.get_metric_history(cell.info.run_id, "loss")) == 4
        assert cell.data.params["federation.rounds"] == "4"
        assert cell.inputs.dataset_inputs[0].dataset.name == "digits"
