import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from rich.console import Console

from fedsim.cli import run
from fedsim.engine.runtime import Runtime
from fedsim.scale.grid import Cell, parse_scale
from fedsim.scale.measure import PARTS, Pool, measure, of_cell
from fedsim.scale.study import ScaleStudy, points
from tests.test_cli import fails

TINY = ["scale", "federation.batch_size=8", "--clients", "4", "8", "--workers", "1", "2", "--rounds", "2"]
TINY += ["--weak", "0", "--actors", "2", "1000000", "--cluster", "1", "8"]


def rows(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "scale.csv")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--clients", "0"], "at least 1, got 0"),
        (["--clients", "ten"], "invalid int value"),
        (["--widths", "wide"], "'wide' is neither a number nor auto"),
        (["--defenses", "gradefense"], "did you mean 'graddefense'"),
        (["--images", "5000"], "cannot hold 5000 of"),
        (["runtime.workers=3"], "use --workers"),
        (["federation.dropout=0.1"], "federation.dropout: the study decides that; all clients report"),
        (["model.name=lenett"], "did you mean 'lenet'"),
        (["--nodes", "2", "--address", "127.0.0.1:1"], "--nodes starts nodes on this machine"),
        (["--address", "127.0.0.1:1", "tracking.uri=off"], "no Ray runtime"),
    ],
)
def test_bad_input_gets_one_line_and_code_2_before_anything_is_measured(
    arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Settings come first: an option takes all that follows.
    settings = (
        sorted(arguments, key=lambda text: "=" not in text) if "tracking.uri=off" in arguments else arguments
    )
    assert fragment in fails(["scale", *settings, "--output", str(tmp_path)], capsys)
    assert not (tmp_path / "scale").exists()


def test_a_dry_run_prints_the_plan_and_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run([*TINY, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    # 4 and 8 clients × 1 and 2 workers, 2 and a million actors, each with two defenses.
    assert "12 cells to measure" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        yield Path(folder)


def command(out: Path, temporary: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the tiny study in a process of its own: a Ray that other tests use may run in this one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "COLUMNS": "200"}
    arguments = [sys.executable, "-m", "fedsim", *TINY, "--output", str(out), *options]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_from_command_to_figures_and_its_resume(tmp_path: Path, temporary: Path) -> None:
    out = tmp_path / "out"
    done = command(out, temporary)
    assert done.returncode == 0, done.stderr
    assert "Extrapolated to a cluster" in done.stdout
    folder = out / "scale"
    table = rows(folder)
    assert len(table) == 10, "a million actors have no room anywhere"
    assert "c1000000-w1000000-k1-none: 1000000 workers, memory has room for" in (folder / "scale.md").read_text()
    for name in ("round_time", "speed_up", "where_the_time_goes"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
    _check_figures(table, pd.read_csv(folder / "rounds.csv"))
    _check_mlflow(out)

    # Two cells lost, as if it had been interrupted: only they are measured again.
    lost = table[(table["clients"] == 8) & (table["workers"] == 2)].index
    table.drop(lost).to_csv(folder / "scale.csv", index=False)
    done = command(out, temporary, "--resume")
    assert done.returncode == 0, done.stderr
    again = rows(folder)
    assert len(again) == 10
    kept = again.merge(table.drop(lost), on=list(table.columns), how="inner")
    assert len(kept) == 8, "what was measured stays as it was"
    assert len(pd.read_csv(folder / "rounds.csv")) == 10 * 2, "a cell measured again replaces its rounds"
    _check_mlflow(out)
    assert not list(temporary.glob("fedsim-*")), "no temporary files are left"


def test_a_folder_that_holds_a_study_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--output", str(tmp_path)]
    config = parse_scale({"clients": [4]}, {}, "test")
    ScaleStudy(config, tmp_path)._claim()
    assert "holds another study" in fails([*arguments, "--resume"], capsys)
    assert "--resume goes on" in fails(["scale", "--clients", "4", "--output", str(tmp_path)], capsys)
    (tmp_path / "scale" / "scale.yaml").rename(tmp_path / "scale" / "other.yaml")
    assert "holds no study" in fails(arguments, capsys)


TWO_NODES = """
import os
from fedsim.config import RuntimeConfig
from fedsim.data.datasets import load_dataset
from fedsim.scale.grid import Workload, parse_scale
from fedsim.scale.measure import measure, started
options = {"clients": [4], "workers": [1, 2], "weak": 0, "defenses": ["none"], "rounds": 1}
config = parse_scale(options, {"federation": {"batch_size": 4}}, "test")
workload = Workload(config, load_dataset(config.experiment.data))
with started(RuntimeConfig(), 2, None, nodes=2) as pool:
    _, rows = measure(config.cells(), workload, pool, print)
assert [row["nodes"] for row in rows] == [1, 2], rows
# Each node that works keeps a copy of the data.
assert rows[1]["store_bytes_held"] > 2 * workload.dataset.train_images.nbytes, rows
assert "RAY_TMPDIR" not in os.environ
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_are_spread_over_several_nodes_and_nothing_is_left(temporary: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_TMPDIR"} | {"TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES], env=environment, capture_output=True, text=True, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    assert not list(temporary.glob("fedsim-*"))
    assert not any(str(temporary) in " ".join(cmdline) for cmdline in _command_lines()), "a process was left"


def _command_lines() -> list[list[str]]:
    processes = psutil.process_iter(["cmdline"])
    return [process.info["cmdline"] or [] for process in processes if process.pid != os.getpid()]


def _check_figures(table: pd.DataFrame, rounds: pd.DataFrame) -> None:
    assert len(rounds) == 10 * 2
    for _, row in table.iterrows():
        cell = Cell(*(row[name] for name in ("clients", "workers", "clients_per_chunk", "defense")))
        own = of_cell(rounds, cell)
        assert row["seconds"] == pytest.approx(own["seconds"].median())
        parts = [f"{part}_seconds" for part in PARTS]
        assert own[parts].sum(axis=1).to_numpy() == pytest.approx(own["seconds"].to_numpy(), rel=1e-6)
        assert sum(row[part] for part in parts) == pytest.approx(row["seconds"], rel=1e-6)
        assert row["weights_bytes"] == row["upload_bytes"], "no defense here sends less than a gradient"
        assert row["uploaded_bytes"] == row["clients"] * row["upload_bytes"]
        assert row["worker_bytes"] > 50 * 2**20
        assert 0 <= row["others_cpu"] <= 1
        assert (row["defense"] == "none") == pd.isna(row["over_none"])


def _check_mlflow(out: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("fedsim").experiment_id])
    parents = [r for r in runs if r.data.tags["fedsim.kind"] == "scale"]
    cells = [r for r in runs if r.data.tags["fedsim.kind"] == "scale_cell"]
    assert (len(parents), len(cells)) == (1, 10), "a resume makes no second run"
    assert {r.info.status for r in runs} == {"FINISHED"}
    for cell in cells:
        assert cell.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert {"seconds", "local_seconds", "worker_bytes", "round_seconds"} <= set(cell.data.metrics)


@pytest.mark.ray
@pytest.mark.slow
def test_a_time_limit_leaves_each_cell_one_round_and_large_cohorts_need_no_warm_up(runtime: Runtime) -> None:
    options = {"clients": [4], "workers": [1, 2], "weak": 0, "defenses": ["none"], "rounds": 3, "longest": 1e-9}
    config = parse_scale(options, {"federation": {"batch_size": 4}}, "test")
    study = ScaleStudy(config, Path("unused"))
    notes: list[str] = []
    rounds, table = measure(config.cells(), study.workload, Pool(runtime, 0.0), notes.append)
    assert rounds["round"].tolist() == [1, 1], "round 0 warms up, and one round is measured whatever the limit"
    assert [row["rounds"] for row in table] == [1, 1]
    assert notes == ["4 clients: 1 of 3 rounds in the time allowed"]
    fitted = points(pd.DataFrame(table).assign(cores=1), config)["none"]
    assert [point.workers for point in fitted] == [1, 1], "workers beyond the cores share them"


def test_tables_of_a_study_without_enough_sizes_leave_the_model_out() -> None:
    from analysis.scale_tables import print_sections, sections

    config = parse_scale(
        {"clients": [4], "workers": [1], "weak": 0, "defenses": ["none"], "actors": []}, {}, "test"
    )
    table = synthetic(config.cells())
    found = sections(table, config, points(table, config), ["c9: no room"])
    assert [section.title for section in found] == ["Round time", "Where the time goes", "Memory and bytes"]
    console = Console(file=io.StringIO(), width=150)
    print_sections(found, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Left out: c9: no room." in printed
    assert "busy with other things in 1 of 1 cells" in printed


def synthetic(cells: list[Cell]) -> pd.DataFrame:
    """Rows as a study writes them, 10 ms a client of the busiest worker."""
    from fedsim.scale.grid import describe

    made = []
    for cell in cells:
        seconds = 0.01 * cell.clients / cell.workers
        row = {**describe(cell), "seconds": seconds, "seconds_low": seconds, "seconds_high": seconds, "rounds": 3}
        row |= {f"{part}_seconds": seconds / len(PARTS) for part in PARTS}
        names = ("worker_bytes", "worker_bytes_max", "server_bytes", "driver_bytes", "store_bytes_held")
        row |= {"nodes": 1, "cores": 4}
        row |= dict.fromkeys((*names, "store_bytes_round", "weights_bytes", "uploaded_bytes"), 2.0**20)
        made.append({**row, "over_none": float("nan"), "others_cpu": 0.3 if cell.clients == 4 else 0.0})
    return pd.DataFrame(made)


def test_speed_up_is_against_the_same_cohort_with_the_fewest_workers() -> None:
    from analysis.scale_tables import speed_up

    options = {"clients": [40, 80], "workers": [1, 2, 4], "widths": [2], "weak": 0, "defenses": ["none", "gc"]}
    table = synthetic(parse_scale(options, {}, "test").cells()).sample(frac=1, random_state=0)
    assert speed_up(table).to_numpy() == pytest.approx(table["workers"].to_numpy(dtype=float))
