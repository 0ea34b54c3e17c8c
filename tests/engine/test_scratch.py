import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from fedsim.engine.scratch import LOCK, Scratch

LEAVE = "import os; from fedsim.engine.scratch import Scratch; print(Scratch().path, flush=True); os._exit(1)"


@pytest.fixture(autouse=True)
def _temporary_files_lie_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def age(folder: Path) -> None:
    os.utime(folder / LOCK, (0, 0))


def test_what_a_killed_driver_left_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    (tmp_path / "fedsim-notes").mkdir()
    left = Path(subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True).stdout.strip())
    with closing(Scratch()) as alive:
        assert left.exists(), "too young to be told from one in the making"
        age(left)
        age(alive.path)
        with closing(Scratch()) as mine:
            assert {path.name for path in tmp_path.iterdir()} == {"fedsim-notes", alive.path.name, mine.path.name}
    assert [path.name for path in tmp_path.iterdir()] == ["fedsim-notes"]
