from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.errors import ConfigError
from fedsim.sweep import plan as plans
from fedsim.sweep.plan import SweepPlan, Trial, load_sweep, reported
from tests.sweep.sweeps import EXPERIMENT, sweep

CONFIGS = sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml"))
SIGMA = {"defense.name": {"grid": ["dp_gaussian"]}, "defense.sigma": {"grid": [0.1]}}
RANDOM = {"search": {"name": "random"}, "budget": {"trials": 4}}


@pytest.mark.parametrize(
    ("space", "settings", "fragment"),
    [
        ({"defence.sigma": {"grid": [1]}}, {}, "did you mean 'defense'"),
        ({"defense.sigma": {"grid": [1]}}, {}, "unknown setting 'sigma'"),
        ({"federation.rounds": {"grid": [3, 0]}}, {}, "greater than or equal to 1, got 0"),
        ({"federation.learning_rate": {"uniform": [0, 1]}}, RANDOM, "federation.learning_rate"),
        (
            {"defense": {"choice": [{"name": "none"}, {"name": "gc", "prune": {"uniform": [0.5, 1]}}]}},
            RANDOM,
            "prune",
        ),
        ({"federation.clients": {"randint": [2, 20]}}, RANDOM, "clients_per_round is 4"),
        ({"attacks.1.iterations": {"grid": [1]}}, {}, "no item '1'"),
        ({"defense.name": {"grid": ["gcc"]}}, {}, "did you mean 'gc'"),
        ({"federation.rounds": 3}, {}, "expected a distribution"),
        ({"seed": {"grid": [1]}}, {}, "the sweep's to set"),
        ({**SIGMA, "federation.rounds": {"randint": [1, 4]}}, {}, "name random or optuna"),
        ({f"federation.{n}": {"grid": list(range(100))} for n in "abc"}, {}, "1,000,000 points"),
        (SIGMA, {"objectives": {"PSRN": "min"}}, "did you mean 'PSNR'"),
        (SIGMA, {"objectives": {"ART_overhead": "min"}}, "not every trial reports 'ART_overhead'"),
        (SIGMA, {"scheduler": {"name": "asha", "metric": "PSNR"}}, "no round reports 'PSNR'"),
        (SIGMA, {"stop": {"SSIM": {"at_least": 1}}}, "no round reports 'SSIM'"),
        (SIGMA, {"seeds": [1, 1]}, "seeds: each once"),
    ],
)
def test_a_bad_sweep_is_refused_with_the_reason(space: dict[str, Any], settings: Any, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(space, **settings)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"scheduler": {"name": "ahsa"}}, "did you mean 'asha'"),
        ({"search": {"name": "optunna"}}, "did you mean 'optuna'"),
        ({"search": {"name": "random"}}, "needs trials or hours"),
        ({"space": {}}, "space: it is empty"),
        ({"comparison": "quick"}, "leave out experiment and space"),
        ({"budget": {"trials": 1000000}}, "budget.trials"),
        ({"sapce": {}}, "did you mean 'space'"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(settings: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"name": "bad", "experiment": EXPERIMENT, "space": SIGMA} | settings))
    with pytest.raises(ConfigError, match="bad.yaml: ") as caught:
        load_sweep(path, [])
    assert fragment in str(caught.value)


def test_an_objective_must_be_reported_everywhere_in_the_space() -> None:
    space = {"attacks": {"grid": [[{"name": "dlg"}], []]}}
    with pytest.raises(ConfigError, match="not every trial reports 'PSNR'"):
        sweep(space, objectives={"PSNR": "min"})


def test_a_defense_brings_its_own_parameters_and_seeds_multiply() -> None:
    plan = sweep(
        {"defense": {"grid": [{"name": "none"}, {"name": "gc", "prune": {"grid": [0.5, 0.9]}}]}}, seeds=[3, 4]
    )
    assert (plan.points, plan.trials) == (3, 6)
    last = list(plan.grid())[-1]
    config = plan.experiment(Trial(5, 2, 4, last))
    assert config.defense.model_dump() == {"name": "gc", "prune": 0.9}
    assert (config.seed, config.name, config.runtime.workers) == (4, "small-0005", 1)
    assert config.federation.rounds == EXPERIMENT["federation"]["rounds"]


def test_a_budget_counts_trials_over_all_seeds() -> None:
    assert sweep(SIGMA, **RANDOM, seeds=[0, 1]).points == 2
    many = {"federation.clients": {"grid": list(range(4, 12))}}
    assert sweep(many, budget={"trials": 5}).trials == 5


def test_a_base_file_lies_beside_the_sweep_and_settings_lie_upon_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"name": "one", "experiment": "base.yaml", "space": SIGMA}))
    plan = load_sweep(path, ["seeds=[7]"])
    assert next(plan.samples()).federation.clients == 12
    assert plan.config.seeds == (7,)


def test_a_comparison_becomes_one_trial_a_cell_and_seed() -> None:
    plan = SweepPlan(plans.SweepConfig(name="tables", comparison="quick", seeds=(0, 1)), {})
    assert plan.trials == 2 * 2 * 6
    point = next(plan.grid())
    assert point["tags"] == {"table": "dga", "dataset": "digits", "defense": "none"}
    assert plan.experiment(Trial(1, 0, 1, point)).seed == 1
    assert plans.describe(point) == "dga digits none"


def test_reported_names_the_strongest_the_attacks_and_the_audits() -> None:
    config = next(sweep(SIGMA).samples())
    assert {"ACC", "ART", "PSNR", "dlg.SSIM", "dlg-naive-r0.PSNR"} <= set(reported(config))
    assert "ART_overhead" not in reported(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_are_valid_and_say_how_to_run_them(path: Path) -> None:
    plan = load_sweep(path, [])
    assert plan.config.name == path.stem
    text = path.read_text()
    assert f"fedsim sweep tune_configs/{path.name}" in text.split("name:")[0]
    assert "minutes" in text.split("name:")[0] or "hours" in text.split("name:")[0]
