import json
from pathlib import Path

from fedsim.results import write_json


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1.5, float("inf")], "b": {"c": float("nan")}, "d": (2, "x", None, True)})
    assert json.loads(path.read_text()) == {"a": [1.5, None], "b": {"c": None}, "d": [2, "x", None, True]}
