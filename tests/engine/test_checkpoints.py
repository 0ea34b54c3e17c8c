from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedsim.engine.checkpoints import Checkpoint, CheckpointFolder

STATE = {"optimizer/weights": np.arange(5, dtype=np.float32), "statistics": np.zeros(0, np.float32)}


def checkpoint(rounds: int) -> Checkpoint:
    return Checkpoint(rounds, STATE, [{"round": r, "loss": 0.5} for r in range(rounds)])


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "mine")
    folder.save(checkpoint(3))
    found = folder.latest()
    assert found is not None
    assert found.rounds_done == 3
    assert found.history == checkpoint(3).history
    assert all(np.array_equal(found.state[name], STATE[name]) for name in STATE)


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "mine")
    for rounds in (1, 2, 10, 11):
        folder.save(checkpoint(rounds))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000010.safetensors", "round-000011.safetensors"]


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:9], lambda b: b"", lambda b: b"not this" * 99])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(tmp_path, "mine")
    folder.save(checkpoint(1))
    newest = folder.save(checkpoint(2))
    newest.write_bytes(damage(newest.read_bytes()))
    found = folder.latest()
    assert found is not None
    assert found.rounds_done == 1
    assert newest.name in caplog.text


def test_another_experiments_checkpoint_is_not_used(tmp_path: Path) -> None:
    theirs, mine = (CheckpointFolder(tmp_path, name) for name in ("theirs", "mine"))
    for rounds in (7, 8):
        theirs.save(checkpoint(rounds))
    assert mine.latest() is None
    mine.save(checkpoint(2))
    found = mine.latest()
    assert found is not None and found.rounds_done == 2, "newer ones of others do not push it out"


def test_adopted_checkpoints_are_this_runs(tmp_path: Path) -> None:
    theirs = CheckpointFolder(tmp_path, "theirs")
    theirs.save(checkpoint(2))
    theirs.save(checkpoint(4))
    mine = CheckpointFolder(tmp_path, "mine")
    mine.adopt()
    found = mine.latest()
    assert found is not None and found.rounds_done == 4 and found.history == checkpoint(4).history
    assert theirs.latest() is None
