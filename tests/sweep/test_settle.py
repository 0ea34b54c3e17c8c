from pathlib import Path

import pytest

from fedsim.sweep.config import point_id
from fedsim.sweep.outcomes import Outcome
from fedsim.sweep.settle import settle
from fedsim.tracking import TrackedRun, Tracker

POINTS = {name: {"federation.rounds": number} for number, name in enumerate(["done", "stopped", "failed", "open"])}


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test")


def child(tracker: Tracker, parent: TrackedRun, name: str) -> TrackedRun:
    tags = {"fedsim.id": name, "fedsim.trial": point_id(POINTS[name]), "fedsim.seed": "0"}
    return tracker.start(name, tags, parent)


def test_every_run_gets_the_status_of_its_trials_end(tracker: Tracker) -> None:
    parent, other = (tracker.start(name, {"fedsim.id": name}) for name in ("sweep", "another sweep"))
    runs = {name: child(tracker, parent, name) for name in POINTS}
    runs["done"].finish()
    runs["stopped"].finish("KILLED")
    stranger = tracker.start("stranger", {"fedsim.id": "x", "fedsim.trial": "y", "fedsim.seed": "0"}, other)
    settle(
        tracker,
        parent,
        [
            Outcome(POINTS["done"], (0, 1), "finished"),
            Outcome(POINTS["stopped"], (0,), "stopped", {"round": 7.0}),
            Outcome(POINTS["failed"], (1, 0), "failed", reason="its process died"),
        ],
    )
    found = {name: tracker.client.get_run(run.run_id) for name, run in runs.items()}
    assert {name: run.info.status for name, run in found.items()} == {
        "done": "FINISHED",
        "stopped": "FINISHED",
        "failed": "FAILED",
        "open": "KILLED",
    }
    assert found["stopped"].data.tags["fedsim.stopped"] == "7"
    assert found["failed"].data.tags["fedsim.reason"] == "its process died"
    assert tracker.client.get_run(stranger.run_id).info.status == "RUNNING"
