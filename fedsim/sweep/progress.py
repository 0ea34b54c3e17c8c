"""How far a sweep has come: what Tune tells of its trials is kept, and shown."""

import time
from collections.abc import Mapping
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedsim.sweep.config import SweepConfig
from fedsim.sweep.outcomes import Outcome, OutcomeFolder, describe


class StopRule(Stopper):  # type: ignore[misc]
    """Ends a trial whose figures have reached what the sweep's `stop` says, and the sweep when its hours are over.

    Attributes:
        over: The hours are over: trials that end now are not done.
    """

    def __init__(self, config: SweepConfig) -> None:
        """Start the clock."""
        self.config, self.over = config, False
        self.end = time.monotonic() + 3600 * (config.budget.hours or float("inf"))

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether a trial is to end now."""
        return any(result.get(name, float("-inf")) >= value for name, value in self.config.stop.items())

    def stop_all(self) -> bool:
        """Return whether all trials are to end now."""
        self.over = self.over or time.monotonic() > self.end
        return self.over


class SweepProgress(Callback):  # type: ignore[misc]
    """Listens to Tune: keeps how each trial ended, draws a bar on a terminal and prints a line a trial."""

    def __init__(
        self, config: SweepConfig, total: int, outcomes: OutcomeFolder, rule: StopRule, console: Console
    ) -> None:
        """Expect `total` trials."""
        self.config, self.total, self.outcomes, self.rule = config, total, outcomes, rule
        self.last: dict[str, dict[str, Any]] = {}
        self.best: float | None = None
        self.done, self.running, self.began = 0, set[str](), time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} trials, {task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(config.name, total=total, state="starting")

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune writes its callbacks to disk for a restore of its own, which sweeps do not use."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `Callback`."""
        self.running.add(trial.trial_id)
        self._draw()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """See `Callback`."""
        self.last[trial.trial_id] = result

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `Callback`."""
        last = self.last.get(trial.trial_id, {})
        if "error" in last:
            self._ended(trial, Outcome(**_plan(trial), status="failed", reason=last["error"]))
        elif last.get("finished"):
            self._ended(trial, Outcome(**_plan(trial), status="finished", metrics=_figures(last)))
        elif not self.rule.stop_all():
            self._ended(trial, Outcome(**_plan(trial), status="stopped", metrics=_figures(last)))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `Callback`."""
        lines = str(trial.get_error() or "").strip().splitlines() or ["its process died"]
        self._ended(trial, Outcome(**_plan(trial), status="failed", reason=lines[-1]))

    def _ended(self, trial: Trial, outcome: Outcome) -> None:
        self.outcomes.save(outcome)
        self.running.discard(trial.trial_id)
        self.done += 1
        if outcome.status == "finished":
            self._compare(outcome.metrics)
        names = [o.metric for o in self.config.objectives if o.metric in outcome.metrics]
        figures = ", ".join(f"{name} {outcome.metrics[name]:.4g}" for name in names)
        text = {"failed": f"failed: {outcome.reason}", "stopped": f"{figures} (stopped early)"}
        seeds = " ".join(map(str, outcome.seeds))
        self.bar.console.print(
            f"{self.done}/{self.total} {describe(outcome.point)} seed {seeds}: "
            f"{text.get(outcome.status, figures)}{self._left('; ')}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        self._draw()

    def _compare(self, metrics: Mapping[str, float]) -> None:
        first = self.config.objectives[0]
        better = max if first.direction == "max" else min
        self.best = metrics[first.metric] if self.best is None else better(self.best, metrics[first.metric])

    def _left(self, before: str) -> str:
        seconds = (time.monotonic() - self.began) / max(1, self.done) * (self.total - self.done)
        if not (self.done and seconds):
            return ""
        return (
            f"{before}about {seconds / 60:.0f} min left"
            if seconds >= 60
            else f"{before}about {seconds:.0f} s left"
        )

    def _draw(self) -> None:
        best = "" if self.best is None else f", best {self.config.objectives[0].metric} {self.best:.4g}"
        state = f"{len(self.running)} running{best}{self._left(', ')}"
        self.bar.update(self.task, completed=self.done, state=state)


def _plan(trial: Trial) -> dict[str, Any]:
    settings = trial.config["trial"]
    return {"point": settings["point"], "seeds": tuple(settings["seeds"])}


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return what a trial reported, without Tune's own additions."""
    from ray.tune.result import AUTO_RESULT_KEYS

    own = {"config", "finished", "checkpoint_dir_name", *AUTO_RESULT_KEYS}
    return {k: float(v) for k, v in result.items() if k not in own and isinstance(v, int | float)}
