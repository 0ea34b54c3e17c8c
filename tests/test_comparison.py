from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.comparison import Comparison
from fedsim.comparison_config import load_comparison_config, narrow, parse_comparison, presets
from fedsim.errors import ConfigError

LAYERS: dict[str, Any] = {
    "name": "layers",
    "datasets": ["digits", "mnist"],
    "seeds": [0, 1],
    "experiment": {"federation": {"rounds": 5, "clients": 20}, "model": {"name": "lenet", "init": "uniform"}},
    "dataset_settings": {"mnist": {"federation": {"rounds": 6}}},
    "tables": {
        "dga": {"attack": {"name": "dlg"}},
        "gia": {
            "attack": {"name": "gia"},
            "experiment": {"model": {"name": "lenet4"}, "federation": {"rounds": 7}},
            "datasets": {"mnist": {"federation": {"rounds": 8}}},
            "defenses": {"gc": {"prune": 0.9}},
        },
    },
    "defenses": {"none": {"name": "none"}, "gc": {"name": "gc", "prune": 0.5}, "pld": {"name": "pld"}},
    "muted": {"pld": ["fc.*"]},
}


def test_layers_are_laid_over_each_other_in_order() -> None:
    cells = {cell.config.name: cell.config for cell in parse_comparison(LAYERS, "test").cells()}
    assert len(cells) == 2 * 2 * 3 * 2
    assert cells["dga-digits-none-seed0"].federation.rounds == 5
    assert cells["dga-mnist-none-seed0"].federation.rounds == 6
    assert cells["gia-digits-none-seed0"].federation.rounds == 7
    assert cells["gia-mnist-none-seed1"].federation.rounds == 8
    assert cells["gia-mnist-none-seed1"].seed == 1
    assert cells["gia-digits-gc-seed0"].defense.model_dump()["prune"] == 0.9
    assert cells["dga-digits-gc-seed0"].defense.model_dump()["prune"] == 0.5
    assert cells["dga-digits-none-seed0"].model.init == "uniform"
    assert cells["gia-digits-none-seed0"].model.name == "lenet4"


def test_muting_adds_a_second_attack_to_that_defense_only() -> None:
    cells = {cell.config.name: cell.config for cell in parse_comparison(LAYERS, "test").cells()}
    muted = cells["dga-digits-pld-seed0"].attacks[1]
    assert (muted.title, muted.ignore) == ("pld_muted", ("fc.*",))
    assert len(cells["dga-digits-gc-seed0"].attacks) == 1


def test_defenses_of_a_seed_share_everything_else() -> None:
    """What makes the columns of a table comparable: same data, model, cohort, victims and attack."""
    cells = [c.config for c in parse_comparison(LAYERS, "test").cells() if c.table == "dga" and c.seed == 0]
    one = [c.to_dict() for c in cells if c.data.name == "digits"]
    for other in one[1:]:
        for key in ("seed", "data", "model", "federation", "audit"):
            assert other[key] == one[0][key]


def test_the_presets_are_valid() -> None:
    assert {"quick", "paper"} <= set(presets())
    for name in presets():
        assert load_comparison_config(name).cells()


def test_the_paper_preset_is_as_large_as_it_says() -> None:
    paper = load_comparison_config("paper")
    assert set(paper.datasets) == {"mnist", "fashion_mnist", "cifar10"}
    assert len(paper.seeds) == 3
    assert set(paper.tables) == {"dga", "gia"}
    assert {cell.config.audit.victims for cell in paper.cells()} == {100}


def test_narrowing_names_what_was_chosen() -> None:
    quick = load_comparison_config("quick")
    assert narrow(quick).name == "quick"
    chosen = narrow(quick, datasets=["mnist"], defenses=["gc"], tables=["dga"], seeds=[4])
    assert (chosen.name, len(chosen.cells())) == ("quick-mnist-dga-gc-seeds4", 1)
    with pytest.raises(ConfigError, match="did you mean 'gc'"):
        narrow(quick, defenses=["gcc"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": []}, "datasets"),
        ({"seeds": ["x"]}, "seeds.0"),
        ({"tabels": {}}, "did you mean 'tables'"),
        ({"defenses": {"gc": {"name": "gc", "prune": 2}}}, "defense.prune"),
        ({"experiment": {"federation": {"clients": 3}}}, "3 clients"),
    ],
)
def test_a_wrong_comparison_is_refused_whole(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_comparison({**LAYERS, **change}, "test").cells()


def test_another_comparisons_folder_is_refused(tmp_path: Path) -> None:
    config = parse_comparison({**LAYERS, "datasets": ["digits"]}, "test")
    folder = tmp_path / "layers"
    folder.mkdir()
    other = config.model_copy(update={"seeds": (9,)})
    (folder / "comparison.yaml").write_text(yaml.safe_dump(other.model_dump(mode="json")))
    with pytest.raises(ConfigError, match="another comparison"):
        next(Comparison(config, tmp_path).run())
