import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from analysis.load import kind_of
from analysis.sweep_report import write_sweep
from analysis.sweeps import load_sweep
from fedsim.errors import ConfigError
from tests.analysis.synthetic import FLOORS, Store

STRENGTHS = {"none": [None], "gc": [0.1, 0.5, 0.9], "dp_gaussian": [0.01, 0.1, 1.0]}


def add_sweep(store: Store, name: str) -> str:
    """Two seeds of seven points, seen by two adversaries; the more strength, the less PSNR and ACC."""
    tags = {"fedsim.kind": "sweep", "fedsim.name": name}
    parent = store.client.create_run(store.experiment, tags=tags, run_name=name).info.run_id
    store.client.log_text(parent, f"name: {name}\n", "sweep.yaml")
    for defense, strengths in STRENGTHS.items():
        for step, strength in enumerate(strengths):
            for seed in (0, 1):
                _add_trial(store, parent, name, defense, strength, step, seed)
    store.client.set_terminated(parent)
    return name


def _add_trial(
    store: Store, parent: str, sweep: str, defense: str, strength: float | None, step: int, seed: int
) -> None:
    tags = {"mlflow.parentRunId": parent, "fedsim.kind": "trial", "fedsim.sweep": sweep, "fedsim.seed": str(seed)}
    tags |= {"fedsim.trial": f"{defense}{step}", "fedsim.defense": defense, "fedsim.dataset": "digits"}
    run = store.client.create_run(store.experiment, tags=tags).info.run_id
    level = 50 if defense == "none" else 30 - 10 * step
    audits = [
        {"attack": "dlg", "adversary": adversary, "strategy": strategy, "round": 0, "PSNR": level + bonus + victim,
         "SSIM": (level + bonus) / 100, "stalled": False, "exhausted": False}
        for adversary, strategy, bonus in (("naive", "", 0), ("adaptive", "survivors", 8))
        for victim in range(2)
    ]  # fmt: skip
    parameter = {"gc": "prune", "dp_gaussian": "sigma"}.get(defense)
    config = {
        "name": "x",
        "seed": seed,
        "defense": {"name": defense} | ({parameter: strength} if parameter else {}),
    }
    accuracy = 0.9 - 0.1 * step - 0.01 * seed
    result = {"dataset": "digits", "ACC": accuracy, "ART": 0.1, "upload_bytes": 9.0, "overhead": None}
    result |= {"audits": audits, "floors": FLOORS, "config": config}
    store.client.log_text(run, json.dumps(result), "result.json")
    store.client.log_metric(run, "ACC", accuracy)
    store.client.set_terminated(run)


@pytest.fixture(scope="module")
def swept(store: Store) -> str:
    return add_sweep(store, "swept")


def test_a_sweep_is_read_from_mlflow_alone(store: Store, swept: str) -> None:
    found = load_sweep(store.uri, swept)
    assert len(found.trials) == 14 and len(found.images) == 14 * 4
    assert found.varied == ["defense.name", "defense.prune", "defense.sigma"]
    assert set(found.trials["floor"]) == {12.0}
    assert kind_of(store.uri, swept) == "sweep"


def test_everything_is_written_and_can_be_opened(store: Store, swept: str, tmp_path: Path) -> None:
    _, written = write_sweep(store.uri, swept, tmp_path)
    for name in ("frontier", "frontier_ssim", "ablation", "importance"):
        with Image.open(written[f"figures/{name}.png"]) as picture:
            assert picture.width > 300
    frontier = pd.read_csv(written["frontier.csv"])
    assert len(frontier) == 7 * 2
    gc = frontier[(frontier["defense"] == "gc") & (frontier["adversary"] == "naive")]
    assert gc["PSNR"].tolist() == pytest.approx([30.5, 20.5, 10.5])
    assert gc["ACC"].tolist() == pytest.approx([0.895, 0.795, 0.695])
    equal = pd.read_csv(written["equal.csv"])
    at_floor = equal[(equal["held"] == "PSNR") & (equal["adversary"] == "naive") & (equal["defense"] == "gc")]
    assert at_floor["value"].item() == pytest.approx(0.695 + 0.1 * 1.5 / 10)
    assert at_floor["between"].item() == "prune=0.5 … prune=0.9"
    stopped = equal[(equal["held"] == "PSNR") & (equal["adversary"] == "adaptive")]
    assert set(stopped["between"]) == {"not reached"}
    page = written["report.html"].read_text()
    assert page.count("data:image/png") == 4 and "http://" not in page and "not reached" in page
    assert "\\begin{tabular}" in written["frontier.tex"].read_text()


def test_an_unknown_sweep_names_those_that_are_there(store: Store, swept: str) -> None:
    with pytest.raises(ConfigError, match="no sweep named 'nothing'.*swept"):
        load_sweep(store.uri, "nothing")
