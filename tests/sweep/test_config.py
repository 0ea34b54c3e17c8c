from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.comparison_config import load_comparison_config
from fedsim.config import ExperimentConfig, parse_config
from fedsim.errors import ConfigError
from fedsim.sweep.config import (
    SweepConfig,
    check_sweep,
    load_sweep_config,
    point_id,
    reported_metrics,
    trial_name,
)

GC = {"name": "sweep", "space": {"defense.name": "gc", "defense.prune": {"grid": [0.1, 0.5]}}}
SHIPPED = sorted(Path("tune_configs").glob("*.yaml"))


def written(tmp_path: Path, data: dict[str, Any]) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"defense.sigmaa": 1, "defense.name": "gc"}}, "unknown setting 'sigmaa'"),
        ({"space": {"defense.name": {"grid": ["gc", "gcc"]}}}, "unknown name 'gcc'; did you mean 'gc'"),
        ({"space": {"defense.name": "gc", "defense.prune": {"grid": [0.1, 7]}}}, "defense.prune"),
        (
            {"space": {"defense.name": "gc", "defense.prune": {"uniform": [0.1, 7]}}, "budget": {"trials": 1}},
            "defense.prune",
        ),
        (
            {
                "space": {"defense.name": "gc", "defense.prune": {"grid": [0.1, 7]}},
                "search": {"name": "optuna"},
                "budget": {"trials": 1},
            },
            "defense.prune",
        ),
        ({"objectives": [{"metric": "PSNR", "direction": "min"}]}, "no trial reports 'PSNR'"),
        ({"scheduler": {"name": "ashaa"}}, "did you mean 'asha'"),
        ({"search": {"name": "optuna"}}, "budget.trials"),
        ({"budget": {"trials": 1}}, "the grid alone has 2 points"),
        ({"space": {"federation.learning_rate": {"uniform": [0.1, 1]}}}, "random axes"),
        ({"stop": {"PSNR": 3}}, "not reported every round"),
        ({"seeds": []}, "seeds"),
        ({"scheduler": {"name": "pbt"}}, "pbt needs axes that it may change"),
        ({"scheduler": {"name": "pbt"}, "alternatives": [{}]}, "without alternatives"),
        ({"scheduler": {"name": "pbt"}, "space": {"seed": {"choice": [1]}}, "budget": {"trials": 1}}, "uniform"),
        (
            {
                "scheduler": {"name": "pbt"},
                "space": {"federation.learning_rate": {"uniform": [0.1, 1]}},
                "budget": {"trials": 2},
                "concurrent": 1,
            },
            "as the cluster holds",
        ),
        (
            {
                "scheduler": {"name": "pbt", "interval": 7},
                "space": {"federation.learning_rate": {"uniform": [0.1, 1]}},
                "budget": {"trials": 1},
            },
            "multiple of federation.evaluate_every \\(10\\), got 7",
        ),
        ({"sapce": {}}, "did you mean 'space'"),
        ({"base": "missing.yaml"}, "cannot be read"),
        (
            {
                "experiment": {"attacks": [{"name": "dlg"}]},
                "objectives": [{"metric": "PSNR", "direction": "min"}],
                "scheduler": {"name": "asha"},
            },
            "known every round",
        ),
    ],
)
def test_bad_sweeps_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_sweep(load_sweep_config(written(tmp_path, GC | change)))
    assert "\n" not in str(caught.value)


def test_a_base_experiment_lies_beside_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("federation: {rounds: 7, clients: 20}")
    data = GC | {"base": "base.yaml", "experiment": {"federation": {"clients": 30}}}
    config = load_sweep_config(written(tmp_path, data))
    federation = config.experiment_at({}, 3).federation
    assert (federation.rounds, federation.clients) == (7, 30)


def test_a_point_has_one_name_whatever_the_order_of_its_paths() -> None:
    assert point_id({"a": 1, "b": 2}) == point_id({"b": 2, "a": 1}) != point_id({"a": 2, "b": 1})


def test_random_points_fill_the_budget(tmp_path: Path) -> None:
    space = {"defense.name": "gc", "defense.prune": {"loguniform": [0.01, 0.9]}}
    config = load_sweep_config(written(tmp_path, GC | {"space": space, "budget": {"trials": 7}}))
    points = config.points()
    assert len(points) == len({trial_name(point, 0) for point in points}) == 7
    check_sweep(config)


def test_a_resume_may_change_the_budget_but_not_the_space(tmp_path: Path) -> None:
    space = {"defense.name": "gc", "defense.prune": {"uniform": [0.01, 0.9]}}
    first = load_sweep_config(written(tmp_path, GC | {"space": space, "budget": {"trials": 2}}))
    more = load_sweep_config(written(tmp_path, GC | {"space": space, "budget": {"trials": 5}, "retries": 0}))
    other = load_sweep_config(written(tmp_path, GC | {"space": GC["space"]}))
    assert first.fingerprint() == more.fingerprint() != other.fingerprint()
    assert more.points()[:2] == first.points(), "a larger budget only adds points"


def test_what_is_promised_of_attacks_is_named_as_results_name_it() -> None:
    config = parse_config({"attacks": [{"name": "dlg", "label": "mine"}], "audit": {"rounds": [0, 2]}})
    assert {"PSNR", "mine-naive-r0.PSNR", "mine-naive-r2.SSIM"} <= reported_metrics(config)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid_and_say_how_to_run_them(path: Path) -> None:
    data = yaml.safe_load(path.read_text())
    if "tables" in data:
        pytest.skip("a comparison, not a sweep")
    check_sweep(load_sweep_config(path))
    head = path.read_text().partition("\nname:")[0]
    assert f"fedsim sweep {path}" in head
    assert "minutes" in head or "days" in head, "what it costs"


def test_a_comparison_is_one_alternative_a_cell(tmp_path: Path) -> None:
    config = load_sweep_config(written(tmp_path, {"name": "tables", "comparison": "quick", "seeds": [3, 4]}))
    source = load_comparison_config("quick")
    cells = source.model_copy(update={"seeds": (4,)}).cells()
    points = config.points()
    assert len(points) == len(cells) == 2 * 6
    for point, cell in zip(points, cells, strict=True):
        assert config.experiment_at(point, 4).fingerprint() == _named(cell.config, config, point).fingerprint()
    check_sweep(config)


def _named(config: ExperimentConfig, sweep: SweepConfig, point: dict[str, Any]) -> ExperimentConfig:
    """The cell under the name and with the workers that it has as a trial."""
    return config.model_copy(update={"name": sweep.experiment_at(point, 4).name})


def test_a_comparison_stands_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="brings its own"):
        load_sweep_config(written(tmp_path, GC | {"comparison": "quick"}))


def test_a_cluster_needs_a_common_place_for_checkpoints(tmp_path: Path) -> None:
    from fedsim.sweep.run import Sweep

    config = load_sweep_config(written(tmp_path, GC))
    with pytest.raises(ConfigError, match="--storage: a cluster's nodes need a common place"):
        Sweep(config, tmp_path, address="auto")
    assert Sweep(config, tmp_path, address="auto", storage="s3://bucket/x").storage == "s3://bucket/x"
