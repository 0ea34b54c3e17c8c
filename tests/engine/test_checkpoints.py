from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedsim.engine.checkpoints import Checkpoint, CheckpointFolder
from fedsim.engine.pool import Faults

STATE = {
    "optimizer/weights": np.arange(5, dtype=np.float32),
    "defense/scale": np.array(1 / 3),  # a tensor without dimensions computes otherwise than one with an entry
    "defense/turned": np.arange(6.0).reshape(2, 3).T,
    "statistics": np.zeros(0, np.float32),
}


def checkpoint(rounds: int) -> Checkpoint:
    return Checkpoint(rounds, STATE, [{"round": r, "loss": 0.5} for r in range(rounds)], Faults(2, 1, 0), 1)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "mine")
    folder.save(checkpoint(3))
    found = folder.latest()
    assert found is not None
    assert found.rounds_done == 3
    assert found.history == checkpoint(3).history
    assert (found.faults, found.rounds_by_wire) == (Faults(2, 1, 0), 1)
    assert found.state.keys() == STATE.keys()
    for name, array in STATE.items():
        assert found.state[name].dtype == array.dtype and found.state[name].shape == array.shape
        assert np.array_equal(found.state[name], array)


def test_records_do_not_swell_the_header(tmp_path: Path) -> None:
    """It ends at 100 MB: a run of 300,000 rounds could not be saved."""
    written = CheckpointFolder(tmp_path, "mine").save(checkpoint(1000)).read_bytes()
    assert int.from_bytes(written[:8], "little") < 1000 < len(written)


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "mine")
    for rounds in (1, 2, 10, 11):
        folder.save(checkpoint(rounds))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000010.safetensors", "round-000011.safetensors"]


def test_a_million_rounds_are_more_than_all_before(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "mine")
    for rounds in (999_998, 999_999, 1_000_000):
        folder.save(Checkpoint(rounds, STATE, []))
    found = folder.latest()
    assert found is not None and found.rounds_done == 1_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-1000000.safetensors", "round-999999.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-7],
        lambda b: b[:9],
        lambda b: b"",
        lambda b: b"not this" * 99,
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        lambda b: b.replace(b'"sha256"', b'"sha255"'),
        lambda b: b.replace(b'"rounds_done": 2', b'"rounds_done": 3'),
    ],
)
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
