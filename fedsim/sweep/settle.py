"""What MLflow is told in the end of trials that could not tell it themselves: stopped, killed, interrupted."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from fedsim.sweep.config import point_id
from fedsim.sweep.outcomes import Outcome
from fedsim.tracking import TrackedRun, Tracker, patiently

REASON_LIMIT = 5000


def settle(tracker: Tracker, parent: TrackedRun, outcomes: Iterable[Outcome]) -> None:
    """Give the runs below `parent` that are not finished the status of their trials' ends.

    A trial that a scheduler or a rule stopped is FINISHED, with the tag `fedsim.stopped` (the round), and has no
    final figures; a failed one is FAILED, with the tag `fedsim.reason`; what `--resume` goes on with is KILLED.
    Every trial's own process must have ended.
    """
    ended = {(point_id(one.point), str(seed)): one for one in outcomes for seed in one.seeds}
    for found in list(_unfinished(tracker, parent)):
        tags, run = found.data.tags, TrackedRun(tracker, found.info.run_id)
        outcome = ended.get((tags["fedsim.trial"], tags["fedsim.seed"]))
        if outcome and outcome.status == "stopped":
            run.tags({"fedsim.stopped": str(int(outcome.metrics.get("round", 0)))})
            run.finish()
        elif outcome and outcome.status == "failed":
            run.tags({"fedsim.reason": (outcome.reason or "")[:REASON_LIMIT]})
            run.finish("FAILED")
        else:
            run.finish("KILLED")


def _unfinished(tracker: Tracker, parent: TrackedRun) -> Iterator[Any]:
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status != 'FINISHED'"
    search = partial(tracker.client.search_runs, [tracker.experiment_id], query)
    token: str | None = None
    while True:
        page = patiently(partial(search, page_token=token))
        yield from page
        token = page.token
        if not token:
            return
