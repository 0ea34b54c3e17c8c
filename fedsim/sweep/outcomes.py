"""How the trials of a sweep ended: one small file each, written by the driver, and what they show together."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedsim.results import write_json
from fedsim.sweep.config import Objective, point_id
from fedsim.sweep.space import Point

MOST_SHOWN = 40
"""Characters of a section's settings that a line shows."""
Status = Literal["finished", "stopped", "failed", "unfinished"]


@dataclass(frozen=True)
class Outcome:
    """One trial of a sweep.

    Attributes:
        point: Its settings by dotted path.
        seeds: Its seeds; one, but for Optuna's trials, which run them all.
        status: `stopped`: ended early by the scheduler or a stop rule; `unfinished`: `--resume` goes on with it.
        metrics: What it reported last, the mean over its seeds.
        reason: Why it failed.
    """

    point: Point
    seeds: tuple[int, ...]
    status: Status = "unfinished"
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None

    @property
    def name(self) -> str:
        """A name that is the same after a resume."""
        return f"{point_id(self.point)}-seed{'-'.join(map(str, self.seeds))}"

    @property
    def done(self) -> bool:
        """Whether a resume leaves the trial alone."""
        return self.status in ("finished", "stopped")


@dataclass(frozen=True)
class OutcomeFolder:
    """The outcomes of a sweep, kept where its driver runs, wherever the trials do."""

    path: Path

    def save(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        write_json(self.path / f"{outcome.name}.json", asdict(outcome))

    def load(self, planned: Outcome) -> Outcome:
        """Return how a planned trial ended, or the plan itself."""
        file = self.path / f"{planned.name}.json"
        return self._read(file) if file.exists() else planned

    def every(self) -> list[Outcome]:
        """Return all that is kept, oldest first."""
        return [self._read(file) for file in sorted(self.path.glob("*.json"), key=lambda f: f.stat().st_mtime_ns)]

    @staticmethod
    def _read(file: Path) -> Outcome:
        data = json.loads(file.read_text(encoding="utf-8"))
        return Outcome(**{**data, "seeds": tuple(data["seeds"])})


def as_frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return one row a trial: its point, seeds, status, and last figures."""
    return pd.DataFrame(
        {
            "point": point_id(one.point),
            **{path: str(v) if isinstance(v, dict | list) else v for path, v in one.point.items()},
            "seeds": " ".join(map(str, one.seeds)),
            "status": one.status,
            "reason": one.reason,
            **one.metrics,
        }
        for one in outcomes
    )


def ranked(outcomes: Sequence[Outcome], objectives: Sequence[Objective]) -> pd.DataFrame:
    """Return the points whose trials have all finished, in order of the first objective, best first.

    Returns:
        One row a point: `point`, `settings` (a text), the mean of each objective over the seeds, and `pareto`:
        whether no other point is at least as good in all objectives and better in one.
    """
    names = [objective.metric for objective in objectives]
    trials: dict[str, list[Outcome]] = {}
    for one in outcomes:
        trials.setdefault(point_id(one.point), []).append(one)
    complete = {point: group for point, group in trials.items() if all(one.status == "finished" for one in group)}
    rows = [
        {
            "point": point,
            "settings": describe(group[0].point),
            **{name: float(np.mean([one.metrics[name] for one in group])) for name in names},
        }
        for point, group in complete.items()
    ]
    frame = pd.DataFrame(rows, columns=["point", "settings", *names])
    signs = [1.0 if objective.direction == "max" else -1.0 for objective in objectives]
    values = frame[names].to_numpy(dtype=float) * signs
    frame["pareto"] = pareto(values)
    return frame.iloc[np.argsort(-values[:, 0], kind="stable")].reset_index(drop=True)


def describe(point: Point) -> str:
    """Return a point as `path=value` texts; sections go by their names, long ones are cut."""
    return ", ".join(f"{path}={_short(value)}" for path, value in point.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_short, value)) + "]"
    if isinstance(value, dict):
        rest = ", ".join(f"{key}={_short(item)}" for key, item in value.items() if key != "name")
        return f"{value.get('name', '')}({textwrap.shorten(rest, MOST_SHOWN, placeholder=' …')})"
    return str(value)


def pareto(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows of `values` [n, m], more being better, no other row beats: shape [n], bool.

    A row beats another if it is at least as good in every column and better in one.
    """
    as_good = (values[:, None] >= values[None]).all(2)
    better = (values[:, None] > values[None]).any(2)
    beaten = (as_good & better).any(axis=0)
    return np.asarray(~beaten, dtype=np.bool_)
