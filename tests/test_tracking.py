"""MLflow goes away and comes back: what was noted arrives once."""

from collections import Counter
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from fedsim import tracking
from fedsim.errors import RunError
from fedsim.tracking import TrackedRun, Tracker, patiently, resolve_uri

RECORD = {"loss": 1.0, "seconds": 0.1, "clients_rejected": 0}


class Away:
    """A client whose every write fails while `away` is positive; half of them only after the write was done."""

    def __init__(self, client: Any) -> None:
        self.client, self.away, self.failed = client, 0, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if self.away <= 0:
                return method(*arguments, **named)
            self.away -= 1
            self.failed[name] += 1
            if self.away % 2:
                method(*arguments, **named)
            raise MlflowException("connection refused")

        return call


class Clock:
    """Time that passes by sleeping only."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)
    return clock


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test", tmp_path / "artifacts")
    tracker.client = Away(tracker.client)  # type: ignore[assignment]
    return tracker


def start(tracker: Tracker) -> TrackedRun:
    return tracker.start("one", {"fedsim.id": "one"})


def test_a_server_that_is_away_costs_no_metric_and_doubles_none(tracker: Tracker, clock: Clock) -> None:
    client: Any = tracker.client
    run = start(tracker)
    run.params({"a": {"b": 1}})
    client.away = 7
    for round_ in range(30):
        clock.now += 1
        run.round({**RECORD, "round": round_, "ACC": round_ / 30})
    assert client.failed["log_batch"] >= 2, "rounds go on while the server is away"
    client.away = 3
    run.tags({"late": "yes"})
    run.finish()
    history = client.get_metric_history(run.run_id, "ACC")
    assert sorted((metric.step, metric.value) for metric in history) == [(r, r / 30) for r in range(30)]
    found = client.get_run(run.run_id)
    assert (found.info.status, found.data.tags["late"], found.data.params["a.b"]) == ("FINISHED", "yes", "1")


def test_rounds_do_not_wait_for_a_server(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker.remote = True
    run = start(tracker)
    answers, asked, plain = Event(), Event(), run.client.log_batch

    def slow(*arguments: Any, **named: Any) -> Any:
        asked.set()
        answers.wait(10)  # who waits for this has failed
        return plain(*arguments, **named)

    monkeypatch.setattr(run.client, "log_batch", slow, raising=False)
    for round_ in range(20):
        run.round({**RECORD, "round": round_, "ACC": round_ / 20})
        assert asked.wait(10), "the first round is sent at once"
    assert not run.client.get_metric_history(run.run_id, "ACC")
    Timer(0.1, answers.set).start()
    run.finish()
    history = run.client.get_metric_history(run.run_id, "ACC")
    assert sorted((metric.step, metric.value) for metric in history) == [(r, r / 20) for r in range(20)]


def test_a_start_is_repeated_without_a_second_run(tracker: Tracker, clock: Clock) -> None:
    client: Any = tracker.client
    client.away = 4
    run = start(tracker)
    assert start(tracker).run_id == run.run_id
    assert len(client.search_runs([tracker.experiment_id])) == 1


def test_a_server_that_stays_away_is_told_after_the_patience(tracker: Tracker, clock: Clock) -> None:
    client: Any = tracker.client
    run = start(tracker)
    client.away = 10**9
    run.metrics({"x": 1.0}, 0)
    with pytest.raises(RunError, match="MLflow: connection refused"):
        run.finish()
    assert clock.now - 1000 >= tracking.PATIENCE_SECONDS
    client.away = 0
    run.finish()
    assert len(client.get_metric_history(run.run_id, "x")) == 1


def test_what_no_waiting_cures_is_told_at_once(clock: Clock) -> None:
    def refuse() -> None:
        raise MlflowException("bad name", error_code=1000)  # INVALID_PARAMETER_VALUE

    with pytest.raises(RunError, match="MLflow: bad name"):
        patiently(refuse)
    assert clock.now == 1000


def test_auto_is_the_environments_server_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri("auto", tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    assert resolve_uri("auto", tmp_path) == "http://10.0.0.1:5000"
    assert resolve_uri("http://other:5000", tmp_path) == "http://other:5000"


def test_who_did_not_report_is_logged_round_by_round(tracker: Tracker) -> None:
    run = start(tracker)
    absent = {"clients_dropped": 2, "clients_late": 1, "late_bytes": 8.0, "simulated_seconds": 12.5}
    run.round({**RECORD, **absent, "round": 0})
    run.round({**RECORD, "round": 1})
    run.finish()
    for name, value in absent.items():
        logged = tracker.client.get_metric_history(run.run_id, name)
        assert [(metric.step, metric.value) for metric in logged] == [(0, value)]
