from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import frames
from analysis.frames import CellKey
from analysis.load import load_comparison
from fedsim.errors import ConfigError
from tests.analysis.synthetic import Cell, Store, small_cells


def test_frames_hold_what_was_logged(store: Store, small: str) -> None:
    comparison = load_comparison(store.uri, small)
    assert comparison.name == "small"
    assert comparison.blocks == [("dga", "mnist")]
    assert comparison.columns == ["none", "graddefense", "gc", "dp_gaussian", "dp_laplacian", "pld", "pld_muted"]
    assert comparison.missing == []
    cells = comparison.cells.set_index("defense")
    assert cells.loc["gc", "ACC"] == 0.37
    assert cells.loc["gc", ["overhead", "overhead_low", "overhead_high"]].tolist() == [0.01, 0.005, 0.015]
    assert np.isnan(cells.loc["none", "overhead"])
    assert cells.loc["gc", "test_images"] == 10_000
    assert len(comparison.images) == 7 * 3
    assert comparison.rounds.groupby("defense").size().to_dict() == dict.fromkeys(cells.index, 30)
    assert set(comparison.floors["guess"]) == {"noise", "uniform", "mean", "grey"}


def test_a_muted_attack_counts_in_a_column_of_its_own(store: Store, small: str) -> None:
    images = load_comparison(store.uri, small).images
    assert images[images["column"] == "pld_muted"]["PSNR"].tolist() == [43, 45, 47]
    assert images[images["column"] == "pld"]["PSNR"].tolist() == [5, 5.5, 6]
    assert set(images[images["column"] == "pld_muted"]["defense"]) == {"pld"}


def test_reconstructions_come_in_audit_order(store: Store, small: str) -> None:
    comparison = load_comparison(store.uri, small)
    pair = comparison.reconstructions(CellKey("dga", "mnist", "none", 0), "dlg", "naive", 0)
    assert pair is not None
    originals, found = pair
    assert originals.shape == found.shape == (3, 1, 8, 8)
    assert np.array_equal(originals, small_cells()[0].images)
    assert comparison.reconstructions(CellKey("dga", "mnist", "none", 0), "gia", "naive", 0) is None


def test_the_newest_of_a_name_wins_and_an_id_finds_the_older(store: Store) -> None:
    older = store.comparison("twice", [Cell("dga", "digits", "none", [10.0], acc=0.1)])
    newer = store.comparison("twice", [Cell("dga", "digits", "none", [20.0], acc=0.2)])
    assert load_comparison(store.uri, "twice").run_id == newer
    assert load_comparison(store.uri).run_id == newer
    assert load_comparison(store.uri, older).cells["ACC"].tolist() == [0.1]


def test_unfinished_cells_are_missing_and_a_repeated_one_replaces_the_former(store: Store) -> None:
    planned = {"datasets": ["digits"], "tables": {"dga": {}}, "defenses": {"none": {}, "gc": {}}, "seeds": [0, 1]}
    parent = store.comparison("part", [Cell("dga", "digits", "none", [10.0], acc=0.1)], planned)
    store.cell(parent, Cell("dga", "digits", "none", [11.0], acc=0.3))
    store.cell(parent, Cell("dga", "digits", "gc", [9.0]), status="FAILED")
    comparison = load_comparison(store.uri, "part")
    assert comparison.cells["ACC"].tolist() == [0.3]
    assert comparison.missing == [
        CellKey("dga", "digits", "none", 1),
        CellKey("dga", "digits", "gc", 0),
        CellKey("dga", "digits", "gc", 1),
    ]


def test_a_cell_without_its_result_is_told_not_hidden(store: Store) -> None:
    parent = store.comparison("torn", [Cell("dga", "digits", "none", [10.0])])
    tags = {"mlflow.parentRunId": parent, "fedsim.kind": "cell", "fedsim.table": "dga"}
    tags |= {"fedsim.dataset": "digits", "fedsim.defense": "gc", "fedsim.seed": "0"}
    run_id = store.client.create_run(store.experiment, tags=tags).info.run_id
    store.client.set_terminated(run_id)
    (line,) = load_comparison(store.uri, "torn").unreadable
    assert run_id in line
    assert "result.json" in line


def test_other_adversaries_count_in_no_table() -> None:
    audits = pd.DataFrame(
        {"attack": ["dlg", "dlg", "gia", "pld_muted"], "adversary": ["naive", "adaptive", "naive", "naive"]}
    )
    key = CellKey("dga", "mnist", "pld", 0)
    assert frames._table_column(key, audits).tolist() == ["pld", "", "", "pld_muted"]


def test_an_unknown_name_lists_the_known_ones(store: Store, small: str) -> None:
    with pytest.raises(ConfigError, match=r"no comparison named 'nope' .* it holds: .*small"):
        load_comparison(store.uri, "nope")


def test_nothing_finished_yet_is_a_clear_error(store: Store) -> None:
    store.comparison("empty", [])
    with pytest.raises(ConfigError, match="'empty' has no finished cell yet"):
        load_comparison(store.uri, "empty")


def test_a_missing_database_is_not_created(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with pytest.raises(ConfigError, match="no tracking database"):
        load_comparison(f"sqlite:///{path}", "small")
    assert not path.exists()


def test_a_store_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(ConfigError, match="cannot read the tracking store") as caught:
        load_comparison(f"sqlite:///{path}", "small")
    assert "\n" not in str(caught.value)
