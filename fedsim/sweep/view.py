"""How far a sweep has come, and what it found, for a terminal or a log."""

import logging
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedsim.sweep.config import SweepConfig
from fedsim.sweep.outcome import Outcome, pareto, point_results
from fedsim.sweep.plan import Trial, describe

log = logging.getLogger("fedsim")
MOST_SHOWN = 15
"""Rows of the Pareto set that are printed; `summary.json` holds all."""


class SweepView:
    """Plain lines: one for each trial that ends, with what is known then."""

    def __init__(self, config: SweepConfig, total: int | None) -> None:
        """Watch a sweep of `total` trials, None if only its time is limited."""
        self.config, self.total = config, total
        self.ended: list[Outcome] = []
        self.running: dict[int, float] = {}
        self._began, self._before = time.monotonic(), 0

    def known(self, outcomes: list[Outcome]) -> None:
        """Take note of trials that ended before this command."""
        self.ended = list(outcomes)
        self._before = len(outcomes)

    def started(self, trial: Trial) -> None:
        """A trial has begun."""
        self.running[trial.number] = time.monotonic()

    def restarted(self, trial: Trial) -> None:
        """A trial's process died; it goes on from its checkpoint."""
        self.line(f"trial {trial.title}: its process died; it goes on from its checkpoint")

    def finished(self, outcome: Outcome) -> None:
        """A trial has ended."""
        self.running.pop(outcome.trial.number, None)
        self.ended.append(outcome)
        self.line(f"trial {outcome.trial.title} {outcome.state}: {self._told(outcome)} | {self.status()}")

    def _told(self, outcome: Outcome) -> str:
        if outcome.state == "failed":
            return f"{describe(outcome.trial.values)}: {outcome.reason}"
        found = [
            f"{name} {outcome.metrics[name]:.4g}" for name in self.config.objectives if name in outcome.metrics
        ]
        return f"{describe(outcome.trial.values)}, seed {outcome.trial.seed}: {', '.join(found) or 'no objective'}"

    def status(self) -> str:
        """Return done, running, best so far and time left in one line."""
        total = "?" if self.total is None else str(self.total)
        parts = [f"{len(self.ended)}/{total} done", f"{len(self.running)} running"]
        best = pareto(point_results(self.ended, self.config), self.config)
        if best:
            values = zip(self.config.objectives, best[0].objectives, strict=True)
            parts.append("best " + ", ".join(f"{name} {value:.4g}" for name, value in values))
        left = self.seconds_left()
        return ", ".join(parts if left is None else [*parts, f"about {left / 60:.0f} min left"])

    def seconds_left(self) -> float | None:
        """Return the seconds that the rest takes at the present pace, None while that is not known."""
        here = len(self.ended) - self._before
        if self.total is None or not here:
            return None
        return (time.monotonic() - self._began) / here * (self.total - len(self.ended))

    def tick(self) -> None:
        """Redraw, if there is something to draw on."""

    def line(self, text: str) -> None:
        """Say one line."""
        log.info(text)

    def __enter__(self) -> "SweepView":
        """Start watching."""
        return self

    def __exit__(self, *_: object) -> None:
        """End watching."""


class BarView(SweepView):
    """A live bar; the lines scroll above it."""

    def __init__(self, config: SweepConfig, total: int | None, console: Console) -> None:
        """Draw on `console`."""
        super().__init__(config, total)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._bar.add_task(config.name, total=total, status="starting")

    def tick(self) -> None:
        """See `SweepView.tick`."""
        self._bar.update(self._task, completed=len(self.ended), status=self.status())

    def line(self, text: str) -> None:
        """See `SweepView.line`."""
        self._bar.console.print(text, highlight=False)
        self.tick()

    def __enter__(self) -> "SweepView":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        self._bar.stop()


def make_view(config: SweepConfig, total: int | None, console: Console) -> SweepView:
    """Return a live bar for a terminal and plain lines for anything else."""
    return BarView(config, total, console) if console.is_terminal else SweepView(config, total)


def print_summary(found: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the best point or the Pareto set, the failures, and where the files are."""
    counts = ", ".join(f"{count} {state}" for state, count in found["trials"].items() if count)
    objectives = found["objectives"]
    what = "the best" if len(objectives) == 1 else "the trade-off (points that no other beats in everything)"
    console.print(f"[bold]{found['name']}[/bold]: {counts or 'no trial'}; {what}:", highlight=False)
    shown = Table(box=None, header_style="bold")
    shown.add_column("point")
    for name, mode in objectives.items():
        shown.add_column(f"{name} ({mode})", justify="right")
    for row in found["best"][:MOST_SHOWN]:
        shown.add_row(row["described"], *(f"{row[name]:.4f}" for name in objectives))
    console.print(shown)
    if len(found["best"]) > MOST_SHOWN:
        console.print(f"and {len(found['best']) - MOST_SHOWN} more", highlight=False)
    for failure in found["failures"]:
        console.print(
            f"failed: trial {failure['number']:04d}: {failure['reason']} (--resume tries it again)",
            style="red",
            highlight=False,
            markup=False,
        )
    console.print(f"wrote {folder}", highlight=False, soft_wrap=True)
