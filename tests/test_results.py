import json
from pathlib import Path

import numpy as np
import pytest

from fedsim.errors import ConfigError
from fedsim.results import AuditResult, RunFolder, write_json


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1.5, float("inf")], "b": {"c": float("nan")}, "d": (2, "x", None, True)})
    assert json.loads(path.read_text()) == {"a": [1.5, None], "b": {"c": None}, "d": [2, "x", None, True]}


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK\3\4")])
def test_an_audit_without_its_images_is_named(damage, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    images = np.zeros((1, 1, 1, 8, 8), dtype=np.uint8)
    folder.save_audit(AuditResult("gia", "naive", "", 0, [], images, images))
    assert folder.load_audit("gia", "naive", "", 0)
    (path,) = tmp_path.rglob("*.npz")
    damage(path)
    with pytest.raises(ConfigError, match=f"{path.name} is missing or damaged"):
        folder.load_audit("gia", "naive", "", 0)
