"""How trials ended, and what a sweep found: the best point, or the Pareto set of several objectives."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fedsim.results import write_json
from fedsim.sweep.config import SweepConfig
from fedsim.sweep.plan import Trial, describe
from fedsim.tracking import flatten

State = Literal["done", "stopped", "failed"]
FILE = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How one trial ended.

    Attributes:
        trial: The trial.
        state: `done`: it ran to its end; `stopped`: a scheduler or a stop rule ended it; `failed`: see `reason`.
        metrics: What it reported last.
        reason: Why it failed.
    """

    trial: Trial
    state: State
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    def save(self, folder: Path) -> None:
        """Write the outcome into the trial's folder, which makes it final."""
        write_json(folder / FILE, {"state": self.state, "metrics": self.metrics, "reason": self.reason})

    @classmethod
    def load(cls, trial: Trial, folder: Path) -> "Outcome | None":
        """Return the outcome in a trial's folder, None if it has not ended."""
        try:
            return cls(trial, **json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (FileNotFoundError, json.JSONDecodeError):
            return None


@dataclass(frozen=True)
class PointResult:
    """A point with the mean of each objective over its seeds."""

    trial: Trial
    objectives: tuple[float, ...]
    seeds: int


def point_results(outcomes: Iterable[Outcome], config: SweepConfig) -> list[PointResult]:
    """Return the points of which every seed has ended with all objectives; the others cannot be compared."""
    by_point: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.state != "failed" and all(name in outcome.metrics for name in config.objectives):
            by_point.setdefault(outcome.trial.point, []).append(outcome)
    return [
        PointResult(group[0].trial, _means(group, config), len(group))
        for _, group in sorted(by_point.items())
        if len(group) == len(config.seeds)
    ]


def _means(group: Sequence[Outcome], config: SweepConfig) -> tuple[float, ...]:
    return tuple(statistics.fmean(one.metrics[name] for one in group) for name in config.objectives)


def pareto(points: Sequence[PointResult], config: SweepConfig) -> list[PointResult]:
    """Return the points that no other is as good as in every objective and better than in one.

    They are sorted by the first objective. With one objective these are the best point and its equals.
    """
    signs = [1 if mode == "max" else -1 for mode in config.objectives.values()]
    values = [tuple(sign * value for sign, value in zip(signs, p.objectives, strict=True)) for p in points]

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in values)

    kept = [(mine, point) for mine, point in zip(values, points, strict=True) if not beaten(mine)]
    return [point for _, point in sorted(kept, key=lambda pair: pair[0], reverse=True)]


def table(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """Return one row a trial: number, point, seed, values by path, state, metrics and reason."""
    rows = []
    for outcome in sorted(outcomes, key=lambda one: one.trial.number):
        trial = outcome.trial
        values = trial.values.get("tags") or flatten({path or ".": value for path, value in trial.values.items()})
        head = {"trial": trial.title, "point": trial.point, "seed": trial.seed, "state": outcome.state}
        rows.append({**head, **values, **outcome.metrics, "reason": outcome.reason})
    return pd.DataFrame(rows)


def summary(outcomes: Sequence[Outcome], config: SweepConfig) -> dict[str, Any]:
    """Return the best, or the Pareto set, as plain data."""
    best = pareto(point_results(outcomes, config), config)
    counts: Mapping[str, int] = {
        state: sum(one.state == state for one in outcomes) for state in ("done", "stopped", "failed")
    }
    return {
        "name": config.name,
        "objectives": dict(config.objectives),
        "trials": dict(counts),
        "best": [
            {
                "point": point.trial.point,
                "values": point.trial.values.get("tags") or point.trial.values,
                "described": describe(point.trial.values),
                **dict(zip(config.objectives, point.objectives, strict=True)),
            }
            for point in best
        ],
        "failures": [{**asdict(one.trial), "reason": one.reason} for one in outcomes if one.state == "failed"],
    }
