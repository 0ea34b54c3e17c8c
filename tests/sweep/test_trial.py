"""Where a trial goes on from, without a cluster: what Tune kept is laid where the simulation looks."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedsim.engine.checkpoints import Checkpoint, CheckpointFolder
from fedsim.results import RunFolder
from fedsim.sweep import trial
from tests.conftest import small_experiment

CONFIG = small_experiment()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointFolder:
    """What Tune kept of another node's, or another trial's, checkpoints."""
    monkeypatch.setattr(
        trial.tune, "get_checkpoint", lambda: SimpleNamespace(as_directory=lambda: nullcontext(tmp_path / "kept"))
    )
    return CheckpointFolder(tmp_path / "kept", CONFIG.fingerprint())


def saved(folder: CheckpointFolder) -> None:
    folder.save(Checkpoint(2, {"statistics": np.zeros(1, np.float32)}, [{"round": 0}, {"round": 1}]))


def test_a_node_that_has_not_seen_the_trial_goes_on_from_what_tune_kept(
    tmp_path: Path, kept: CheckpointFolder
) -> None:
    saved(kept)
    trial._restore(CONFIG, tmp_path / "new", evolving=False)
    RunFolder(tmp_path / "new").check(CONFIG, resume=True)
    found = CheckpointFolder(tmp_path / "new/checkpoints", CONFIG.fingerprint()).latest()
    assert found is not None and found.rounds_done == 2


def test_another_seeds_checkpoint_is_left_alone(tmp_path: Path, kept: CheckpointFolder) -> None:
    saved(kept)
    other = CONFIG.model_copy(update={"seed": 5})
    trial._restore(other, tmp_path / "new", evolving=False)
    assert not (tmp_path / "new").exists()


def test_in_a_population_it_is_made_the_trials_own(tmp_path: Path, kept: CheckpointFolder) -> None:
    saved(kept)
    other = CONFIG.model_copy(update={"seed": 5})
    trial._restore(other, tmp_path / "new", evolving=True)
    found = CheckpointFolder(tmp_path / "new/checkpoints", other.fingerprint()).latest()
    assert found is not None and found.rounds_done == 2


def test_a_node_that_has_the_trial_keeps_its_own(tmp_path: Path, kept: CheckpointFolder) -> None:
    saved(kept)
    (tmp_path / "new").mkdir()
    trial._restore(CONFIG, tmp_path / "new", evolving=False)
    assert not list((tmp_path / "new").iterdir())
