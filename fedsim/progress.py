"""How far a command has come: bars on a terminal, plain lines elsewhere."""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("fedsim")


class Reporter:
    """Says nothing; the base of the reporters that do, and what the Python API uses."""

    def begin(self, title: str, rounds: int, done: int = 0) -> None:
        """Start a simulation of `rounds` rounds, `done` of which are behind it."""

    def round(self, record: dict[str, Any]) -> None:
        """One round has ended."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint was written."""

    def note(self, text: str) -> None:
        """Say one line."""

    def __enter__(self) -> "Reporter":
        """Start reporting."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End reporting."""


class LogReporter(Reporter):
    """Plain log lines: notes, and a line for each evaluation."""

    def __init__(self) -> None:
        """Start without a title."""
        self.title, self.rounds = "", 0

    def begin(self, title: str, rounds: int, done: int = 0) -> None:
        """See `Reporter.begin`."""
        self.title, self.rounds = title, rounds
        log.info("%s: %d rounds%s", title, rounds, f", {done} of them done before" if done else "")

    def round(self, record: dict[str, Any]) -> None:
        """See `Reporter.round`."""
        if record.get("ACC") is None:
            return
        number, every = record["round"] + 1, max(1, self.rounds // 4)
        if number == self.rounds or number // every > (number - 1) // every:
            log.info("%s: round %d of %d, ACC %.4f", self.title, number, self.rounds, record["ACC"])

    def note(self, text: str) -> None:
        """See `Reporter.note`."""
        log.info(text)


class BarReporter(Reporter):
    """A progress bar for the simulation under way; notes scroll above it."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
            TextColumn("{task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None

    def begin(self, title: str, rounds: int, done: int = 0) -> None:
        """See `Reporter.begin`."""
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(title, total=rounds, completed=done, accuracy="")

    def round(self, record: dict[str, Any]) -> None:
        """See `Reporter.round`."""
        if self.task is None:
            return
        accuracy = record.get("ACC")
        fields = {} if accuracy is None else {"accuracy": f"ACC {accuracy:.4f}"}
        self.bar.update(self.task, completed=record["round"] + 1, **fields)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        """See `Reporter.note`."""
        self.bar.console.print(text, highlight=False)

    def __enter__(self) -> "Reporter":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self.bar.stop()


def reporter(console: Console) -> Reporter:
    """Return bars for a terminal and log lines for anything else."""
    return BarReporter(console) if console.is_terminal else LogReporter()
