"""The privacy–utility frontier of a sweep: what accuracy is left at which protection, for every defense."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.adversaries import ADVERSARIES
from analysis.names import BASELINE, ordered_columns, ordered_datasets
from analysis.statistics import Estimate, mean_interval
from analysis.sweeps import SweepResults, strongest
from fedsim.sweep.outcomes import pareto

ALLOWED_LOSS = 0.02
"""Equal accuracy is asked for this far below that of no defense."""


@dataclass(frozen=True)
class Point:
    """One strength of one defense against one adversary.

    Attributes:
        dataset: The data set.
        adversary: What the attacker knows.
        defense: The defense.
        trial: Id of the point in the sweep.
        settings: What distinguishes it from the defense's other points.
        strength: The value of its one setting that is a number; None if there are none or several.
        ACC: Accuracy (0–1), with its 95 % interval over seeds; no interval with one seed.
        PSNR: That of the adversary's strongest attack, in dB, with its interval over victims and seeds.
        SSIM: The same attack's.
        unsound: Images whose search failed by itself.
        efficient: No point of the data set and adversary is as good in ACC and PSNR and better in one.
    """

    dataset: str
    adversary: str
    defense: str
    trial: str
    settings: str
    strength: float | None
    ACC: Estimate
    PSNR: Estimate
    SSIM: Estimate
    unsound: int
    efficient: bool = False


@dataclass(frozen=True)
class Equal:
    """What a defense yields where all are held to the same bar.

    Attributes:
        dataset: The data set.
        adversary: What the attacker knows.
        defense: The defense.
        held: What is held equal: `PSNR` or `ACC`.
        bar: Its value.
        value: The other figure there: ACC (0–1) or PSNR (dB); None if the sweep does not reach the bar.
        between: The two settings that it was interpolated between, the same twice if one lies on the bar.
    """

    dataset: str
    adversary: str
    defense: str
    held: str
    bar: float
    value: float | None
    between: tuple[str, str] | None


def points(sweep: SweepResults) -> list[Point]:
    """Return the points of every data set, adversary and defense, dominated ones marked."""
    found: list[Point] = []
    for adversary in ADVERSARIES:
        own = strongest(sweep.images, adversary) if len(sweep.images) else sweep.images
        if own.empty or adversary not in set(sweep.images["adversary"]):
            continue
        for dataset in ordered_datasets(own["dataset"]):
            block = own[own["dataset"] == dataset]
            mine = [
                _point(sweep, block[block["trial"] == trial], dataset, adversary, defense, str(trial))
                for defense in ordered_columns(block["defense"])
                for trial in block.loc[block["defense"] == defense, "trial"].unique()
            ]
            found += _marked(mine)
    return found


def _point(
    sweep: SweepResults, own: pd.DataFrame, dataset: str, adversary: str, defense: str, trial: str
) -> Point:
    trials = sweep.trials[sweep.trials["trial"] == trial]
    settings = _settings(trials.iloc[0], sweep.varied)
    numbers = [float(value) for value in settings.values() if isinstance(value, int | float)]
    return Point(
        dataset,
        adversary,
        defense,
        trial,
        ", ".join(f"{name}={v:.4g}" if isinstance(v, float) else f"{name}={v}" for name, v in settings.items()),
        numbers[0] if len(numbers) == 1 else None,
        ACC=mean_interval(trials["ACC"], range(len(trials))),
        PSNR=mean_interval(own["PSNR"], own["seed"]),
        SSIM=mean_interval(own["SSIM"], own["seed"]),
        unsound=int((own["stalled"] | own["exhausted"]).sum()),
    )


def _settings(trial: pd.Series, varied: Sequence[str]) -> dict[str, Any]:
    known = {path: trial[path] for path in varied if path in trial and not pd.isna(trial[path])}
    return {path.rpartition(".")[2]: value for path, value in known.items() if path != "defense.name"}


def by_strength(found: Sequence[Point]) -> list[Point]:
    """Return the points of one curve in order: by their strength, or where it is no number by falling PSNR."""
    if all(point.strength is not None for point in found):
        return sorted(found, key=lambda point: point.strength or 0.0)
    return sorted(found, key=lambda point: -point.PSNR.value)


def _marked(found: list[Point]) -> list[Point]:
    if not found:
        return found
    values = np.array([[point.ACC.value, -point.PSNR.value] for point in found])
    return [replace(p, efficient=bool(best)) for p, best in zip(found, pareto(values), strict=True)]


def interpolate(curve: Sequence[tuple[float, float]], bar: float) -> tuple[float, int, int] | None:
    """Return y where a piecewise linear curve first meets x = bar, and the indices of the two points around it.

    Args:
        curve: (x, y) in the order of strength; x need not rise or fall all the way.
        bar: Where to read y; outside the curve nothing is guessed.
    """
    for index, ((x, y), (next_x, next_y)) in enumerate(zip(curve, curve[1:], strict=False)):
        if min(x, next_x) <= bar <= max(x, next_x):
            share = 0.0 if next_x == x else (bar - x) / (next_x - x)
            return y + share * (next_y - y), index, index + 1
    if len(curve) == 1 and curve[0][0] == bar:
        return curve[0][1], 0, 0
    return None


def equals(found: Sequence[Point], floors: dict[str, float]) -> list[Equal]:
    """Return ACC at equal protection (PSNR at the floor) and PSNR at equal accuracy, for every curve.

    A curve starts at no defense and runs through the defense's points in order of strength; the first place where
    it meets the bar counts.

    Args:
        found: As `points` returns them.
        floors: PSNR of the best blind guess by data set.
    """
    rows = []
    for dataset, adversary in dict.fromkeys((p.dataset, p.adversary) for p in found):
        block = [p for p in found if (p.dataset, p.adversary) == (dataset, adversary)]
        bare = [p for p in block if p.defense == BASELINE]
        for defense in dict.fromkeys(p.defense for p in block if p.defense != BASELINE):
            own = by_strength([p for p in block if p.defense == defense])
            curve = [*bare[:1], *own]
            bars = {"PSNR": floors[dataset]}
            if bare:
                bars["ACC"] = bare[0].ACC.value - ALLOWED_LOSS
            for held, bar in bars.items():
                pairs = [(p.PSNR.value, p.ACC.value) for p in curve]
                at = interpolate(pairs if held == "PSNR" else [(y, x) for x, y in pairs], bar)
                between = None if at is None else (_name(curve[at[1]]), _name(curve[at[2]]))
                rows.append(Equal(dataset, adversary, defense, held, bar, at[0] if at else None, between))
    return rows


def _name(point: Point) -> str:
    return point.settings if point.defense != BASELINE else "no defense"


def floors_of(sweep: SweepResults, metric: str = "floor") -> dict[str, float]:
    """Return the mean PSNR (or SSIM, `floor_SSIM`) of the best blind guess by data set."""
    return {str(name): float(value) for name, value in sweep.trials.groupby("dataset")[metric].mean().items()}
