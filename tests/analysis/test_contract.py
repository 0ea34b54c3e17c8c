"""The writers of fedsim and the readers here agree: what the tracker logs is what the analysis reads."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from analysis.frames import IMAGE_COLUMNS, CellKey
from analysis.load import load_comparison
from fedsim.config import ExperimentConfig
from fedsim.privacy.audit import AuditRow
from fedsim.results import AuditResult, RunFolder, SimulationResult
from fedsim.tracking import Tracker
from tests.analysis.synthetic import FLOORS, Store

KEY = CellKey("dga", "digits", "gc", 3)


def finished_cell(folder: RunFolder) -> SimulationResult:
    rows = [
        AuditRow(
            "dlg",
            "naive",
            "",
            0,
            victim,
            victim,
            0,
            7,
            40.0 + victim,
            0.9,
            False,
            1e-6,
            0.0,
            300,
            False,
            False,
            1.0,
        )
        for victim in range(2)
    ]
    images = np.arange(2 * 64, dtype=np.uint8).reshape(2, 1, 1, 8, 8)
    audit = AuditResult("dlg", "naive", "", 0, rows, images, images[::-1].copy())
    config = ExperimentConfig(name=str(KEY), seed=KEY.seed)
    summary = {"name": str(KEY), "seed": KEY.seed, "dataset": "digits", "ACC": 0.8, "ART": 0.1, "rounds": 2}
    summary |= {"audits": [asdict(row) for row in rows], "floors": FLOORS, "versions": {}, "hardware": {}}
    summary |= {"overhead": {"pairs": 4, "median": 0.1, "low": 0.0, "high": 0.2}, "faults": {}}
    summary |= {"model_sha256": "00", "upload_bytes": 1.0, "timing": {}, "config": config.to_dict()}
    rounds = pd.DataFrame({"round": [0, 1], "loss": [2.0, 1.0], "ACC": [None, 0.8], "seconds": 0.1})
    result = SimulationResult(config, summary, rounds, [audit])
    folder.claim(config)
    folder.save_audit(audit)
    folder.save_result(result)
    return result


def test_a_cell_written_by_the_tracker_is_read_back(store: Store, tmp_path: Path) -> None:
    tracker = Tracker(store.uri, "fedsim")
    parent = tracker.start("real", {"fedsim.kind": "comparison", "fedsim.name": "real", "fedsim.id": "real"})
    tags = {f"fedsim.{name}": str(value) for name, value in KEY._asdict().items()}
    run = tracker.start(str(KEY), {"fedsim.kind": "cell", "fedsim.id": "cell", **tags}, parent)
    folder = RunFolder(tmp_path / "cell")
    labels = {"train_labels": np.zeros(5), "test_labels": np.zeros(360)}
    run.dataset(SimpleNamespace(name="digits", fingerprint="f" * 64, **labels), "digits")
    run.result(finished_cell(folder), folder)
    run.finish()

    comparison = load_comparison(store.uri, "real")
    (cell,) = comparison.cells.to_dict("records")
    assert {name: cell[name] for name in ("ACC", "ART", "test_images", "overhead")} == {
        "ACC": 0.8,
        "ART": 0.1,
        "test_images": 360,
        "overhead": 0.1,
    }
    assert not comparison.images[IMAGE_COLUMNS].isna().any(axis=None)
    assert comparison.images["PSNR"].tolist() == [40, 41]
    pair = comparison.reconstructions(KEY, "dlg", "naive", 0)
    assert pair is not None
    assert np.array_equal(pair[0], pair[1][::-1])
    assert comparison.configs[KEY] == (folder.path / "config.yaml").read_text()
