"""Whole sweeps, each in a process of its own, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from fedsim.engine.runtime import Runtime
from fedsim.simulation import Simulation
from fedsim.sweep.config import SweepConfig

# Generous, for machines that do other work: a sweep starts half a dozen processes that each import PyTorch.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

TINY: dict[str, Any] = {
    "name": "tiny",
    "concurrent": 1,
    "experiment": {
        "federation": {"rounds": 6, "clients": 20, "clients_per_round": 6, "evaluate_every": 2},
        "attacks": [{"name": "dlg", "iterations": 20}],
        "audit": {"victims": 1},
        "checkpoint_every": 2,
    },
    "alternatives": [
        {"defense.name": "none"},
        {"defense.name": "gc", "defense.prune": {"grid": [0.5, 0.9]}},
    ],
    "objectives": [{"metric": "ACC", "direction": "max"}, {"metric": "PSNR", "direction": "min"}],
}


def start(folder: Path, sweep: dict[str, Any], *options: str) -> "subprocess.Popen[str]":
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep))
    command = [sys.executable, "-m", "fedsim", "sweep", str(file), "--output", str(folder / "out"), *options]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    STARTED.append(process)
    return process


STARTED: "list[subprocess.Popen[str]]" = []


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """End what a failed test left running; Ray's processes end with their driver."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


def mlflow_runs(folder: Path) -> pd.DataFrame:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/out/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    return pd.DataFrame(
        {**{f"tag.{k}": v for k, v in run.data.tags.items()}, **run.data.metrics, "run": run.info.run_id,
         "status": run.info.status, "rounds": len(client.get_metric_history(run.info.run_id, "loss"))}
        for run in runs
    )  # fmt: skip


def test_a_sweep_is_logged_and_a_resume_does_nothing_twice(tmp_path: Path) -> None:
    first = start(tmp_path, TINY)
    output, _ = first.communicate(timeout=600)
    assert first.returncode == 0, output
    assert "3/3 " in output and "No other point beats these" in output

    runs = mlflow_runs(tmp_path)
    parent = runs[runs["tag.fedsim.kind"] == "sweep"].iloc[0]
    trials = runs[runs["tag.fedsim.kind"] == "trial"]
    assert len(trials) == 3 and set(trials["tag.mlflow.parentRunId"]) == {parent["run"]}
    assert set(trials["tag.fedsim.defense"]) == {"none", "gc"} and trials["tag.fedsim.trial"].nunique() == 3
    assert (trials["status"] == "FINISHED").all() and parent["status"] == "FINISHED"
    assert (trials["rounds"] == 6).all()
    table = pd.read_csv(tmp_path / "out/tiny/trials.csv").set_index("point")
    for _, trial in trials.iterrows():
        row = table.loc[trial["tag.fedsim.trial"]]
        assert row["ACC"] == pytest.approx(trial["ACC"]) and row["PSNR"] == pytest.approx(trial["PSNR"])

    again = start(tmp_path, TINY)
    refused, _ = again.communicate(timeout=60)
    assert again.returncode == 2 and "--resume goes on with it" in refused
    resumed = start(tmp_path, TINY, "--resume")
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0 and "1/3" not in output, output
    assert len(mlflow_runs(tmp_path)) == len(runs)


def wait_for(condition: Any, seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, runtime: Runtime) -> None:
    federation = {**TINY["experiment"]["federation"], "rounds": 30}
    sweep = {**TINY, "experiment": {**TINY["experiment"], "federation": federation}}
    config = SweepConfig.model_validate(sweep)
    undisturbed = {}
    for experiment in (config.experiment_at(point, 0) for point in config.points()):
        undisturbed[experiment.name] = Simulation(experiment, runtime=runtime).run().summary["model_sha256"]
    assert len(undisturbed) == 3

    victim = start(tmp_path, sweep)
    outcomes, trials = tmp_path / "out/tiny/outcomes", tmp_path / "out/tiny/trials"
    wait_for(lambda: len(list(outcomes.glob("*.json"))) == 1 and len(list(trials.glob("*/checkpoints/*"))) > 2)
    children = psutil.Process(victim.pid).children(recursive=True)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    resumed = start(tmp_path, sweep, "--resume")
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    assert "2/2 " in output, "the finished trial is not run again"
    _, left = psutil.wait_procs(children, timeout=300)
    assert not left, "Ray's processes end with their driver"

    results = {path.parent.name: json.loads(path.read_text()) for path in trials.glob("*/result.json")}
    assert {name: result["model_sha256"] for name, result in results.items()} == undisturbed
    runs = mlflow_runs(tmp_path)
    assert (runs["tag.fedsim.kind"] == "trial").sum() == 3 and (runs["status"] == "FINISHED").all()


def test_optuna_searches_a_conditional_space_and_resumes(tmp_path: Path) -> None:
    sweep = {
        **TINY,
        "experiment": {**TINY["experiment"], "attacks": [], "federation": {"rounds": 2, "clients": 20}},
        "alternatives": [
            {"defense.name": "none"},
            {"defense.name": "gc", "defense.prune": {"uniform": [0.1, 0.9]}},
        ],
        "objectives": [{"metric": "ACC", "direction": "max"}, {"metric": "upload_bytes", "direction": "min"}],
        "search": {"name": "optuna", "startup_trials": 2},
        "budget": {"trials": 3},
        "seeds": [0, 1],
    }
    first = start(tmp_path, sweep)
    output, _ = first.communicate(timeout=600)
    assert first.returncode == 0, output
    more = start(tmp_path, {**sweep, "budget": {"trials": 5}}, "--resume")
    output, _ = more.communicate(timeout=600)
    assert more.returncode == 0 and "2/2 " in output, output
    table = pd.read_csv(tmp_path / "out/tiny/trials.csv")
    assert len(table) <= 5 and (table["status"] == "finished").all() and set(table["seeds"]) == {"0 1"}
    trials = mlflow_runs(tmp_path)
    assert (trials["tag.fedsim.kind"] == "trial").sum() == 2 * len(table)


def test_a_trial_that_fails_says_why_and_the_rest_go_on(tmp_path: Path) -> None:
    sweep = {
        **TINY,
        "experiment": {"federation": {"rounds": 4, "clients": 20, "clients_per_round": 6, "dropout": 0.3}},
        "alternatives": [{"federation.min_clients": {"grid": [1, 6]}}],
        "objectives": [{"metric": "ACC", "direction": "max"}],
    }
    failing = start(tmp_path, sweep)
    output, _ = failing.communicate(timeout=600)
    assert failing.returncode == 1, output
    assert "fewer than federation.min_clients" in output and "2/2 " in output
    table = pd.read_csv(tmp_path / "out/tiny/trials.csv").set_index("federation.min_clients")
    assert table["status"].to_dict() == {1: "finished", 6: "failed"}


def test_a_trial_whose_process_dies_goes_on_and_a_stop_rule_ends_it(tmp_path: Path) -> None:
    sweep = {
        "name": "tiny",
        "experiment": {
            "federation": {"rounds": 60, "clients": 20, "clients_per_round": 6, "evaluate_every": 40},
            "checkpoint_every": 2,
        },
        "stop": {"ACC": 0.0},
    }
    running = start(tmp_path, sweep)
    trials = tmp_path / "out/tiny/trials"
    wait_for(lambda: list(trials.glob("*/checkpoints/round-*")) or running.poll() is not None)
    (victim,) = [p for p in psutil.Process(running.pid).children(recursive=True) if "ImplicitFunc" in p.name()]
    victim.kill()
    output, _ = running.communicate(timeout=600)
    assert running.returncode == 0 and "(stopped early)" in output, output
    runs = mlflow_runs(tmp_path)
    (trial,) = [run for _, run in runs.iterrows() if run["tag.fedsim.kind"] == "trial"]
    assert trial["rounds"] == 40, "every round once"
    assert (trial["status"], trial["tag.fedsim.stopped"]) == ("FINISHED", "40")
    resumed = start(tmp_path, sweep, "--resume")
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0 and "1/1" not in output, "what was stopped is not run again"


def test_a_population_goes_on_from_its_best(tmp_path: Path) -> None:
    sweep = {
        "name": "tiny",
        "experiment": {
            "federation": {"rounds": 8, "clients": 20, "clients_per_round": 6, "evaluate_every": 2},
            "model": {"init": "uniform"},
        },
        "space": {"federation.learning_rate": {"loguniform": [1e-6, 0.1]}},
        "budget": {"trials": 4},
        "objectives": [{"metric": "loss", "direction": "min"}],
        "scheduler": {"name": "pbt", "interval": 4, "quantile": 0.5},
    }
    evolving = start(tmp_path, sweep)
    output, _ = evolving.communicate(timeout=600)
    assert evolving.returncode == 0, output
    table = pd.read_csv(tmp_path / "out/tiny/trials.csv")
    assert (table["status"] == "finished").all() and len(table) >= 2
    assert table["federation.learning_rate"].between(1e-6, 0.1).all()
    folders = list((tmp_path / "out/tiny/trials").iterdir())
    assert len(folders) == 4 + 2, "after 4 rounds the worse half took other settings"
    for row in (tmp_path / "out/tiny/trials").glob("*/rounds.csv"):
        assert pd.read_csv(row)["round"].tolist() == list(range(8)), "copied rounds are part of the history"
