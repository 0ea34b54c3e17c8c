"""Defenses against attackers who know of them: the best that each adversary can do.

Whoever knows more can also do what the others do, so an adversary's figure is that of the best strategy among its
own and those of the adversaries who know less: best by mean PSNR over the same victims. The choice looks at the
private images, as a defender must who asks how bad it can get; an attacker could only guess it.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.load import Comparison
from analysis.names import BASELINE, dataset_title, look, ordered_columns
from analysis.statistics import Estimate, mean_interval, proportion_interval

ADVERSARIES = ("naive", "adaptive", "oracle")
SUCCESS_PSNR, SUCCESS_SSIM = 20.0, 0.5
"""An attack on an image succeeds above both."""


@dataclass(frozen=True)
class Row:
    """The best attack of one adversary on one defense.

    Attributes:
        table: Table of the comparison: which attack, model and initialisation.
        dataset: The data set.
        defense: The defense's label.
        adversary: What the attacker knows.
        strategy: The best strategy; "" is the plain attack.
        told: Whether this adversary can do anything that those who know less cannot.
        PSNR: In dB, with its 95 % interval over victims (and seeds).
        SSIM: The same.
        success: Share of images above `SUCCESS_PSNR` and `SUCCESS_SSIM`, with Wilson's interval.
        images: Number of images.
        unsound: Images whose search failed by itself: they never count as protection.
        floor: PSNR of the best guess that knows nothing, dB.
        learned: What the attack had learned before, a line a seed where they differ; "" if nothing.
    """

    table: str
    dataset: str
    defense: str
    adversary: str
    strategy: str
    told: bool
    PSNR: Estimate
    SSIM: Estimate
    success: Estimate
    images: int
    unsound: int
    floor: float
    learned: str


def summarise(comparison: Comparison) -> list[Row]:
    """Return one row a defense and adversary; none if the comparison has naive adversaries only."""
    images = comparison.images
    if set(images["adversary"]) <= {"naive"}:
        return []
    rows = []
    for place, cell, floor in _cells(comparison):
        for number, adversary in enumerate(ADVERSARIES[: 1 if place[2] == BASELINE else None]):
            able = cell[cell["adversary"].isin(ADVERSARIES[: number + 1])]
            if len(able):
                told = adversary in set(able["adversary"])
                rows.append(_row(place, adversary, told, strongest_of(able), floor))
    return rows


def strongest_of(able: pd.DataFrame) -> pd.DataFrame:
    """Return the images of the attack and strategy with the highest mean PSNR; of equals, the one tried first."""
    tried = able["attack"] + " " + able["adversary"] + " " + able["strategy"]
    return able[tried == able.groupby(tried, sort=False)["PSNR"].mean().idxmax()]


def every(comparison: Comparison) -> list[Row]:
    """Return one row for each strategy that any adversary tried on a defense."""
    return [
        _row(place, str(adversary), True, own, floor)
        for place, cell, floor in _cells(comparison)
        for (adversary, _, _), own in cell.groupby(["adversary", "attack", "strategy"], sort=False)
    ]


def _cells(comparison: Comparison) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame, float]]:
    """Yield (table, data set, defense), its images, and the floor."""
    for table, dataset in comparison.blocks:
        floors = Comparison.part(comparison.floors, table, dataset)
        floor = float(floors.groupby("guess")["PSNR"].mean().max())
        block = Comparison.part(comparison.images, table, dataset)
        for defense in ordered_columns(block["defense"]):
            yield (table, dataset, defense), block[block["defense"] == defense], floor


def _row(place: tuple[str, str, str], adversary: str, told: bool, own: pd.DataFrame, floor: float) -> Row:
    won = (own["PSNR"] > SUCCESS_PSNR) & (own["SSIM"] > SUCCESS_SSIM)
    return Row(
        *place,
        adversary=adversary,
        strategy=str(own["strategy"].iloc[0]),
        told=told,
        PSNR=mean_interval(own["PSNR"], own["seed"]),
        SSIM=mean_interval(own["SSIM"], own["seed"]),
        success=proportion_interval(float(won.mean()), len(own)),
        images=len(own),
        unsound=int((own["stalled"] | own["exhausted"]).sum()),
        floor=floor,
        learned="; ".join(filter(None, own["learned"].unique())),
    )


def csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV; "" without rows."""
    if not rows:
        return ""
    flat = [
        {
            **{name: getattr(row, name) for name in ("table", "dataset", "defense", "adversary", "strategy")},
            **{
                f"{name}{end}": round(value, 6)
                for name in ("PSNR", "SSIM", "success")
                for end, value in _ends(getattr(row, name)).items()
            },
            **{name: getattr(row, name) for name in ("images", "unsound", "floor", "learned")},
        }
        for row in rows
    ]
    buffer = io.StringIO()
    pd.DataFrame(flat).to_csv(buffer, index=False)
    return buffer.getvalue()


def _ends(estimate: Estimate) -> dict[str, float]:
    return {"": estimate.value, "_low": estimate.low, "_high": estimate.high}


def markdown(rows: Sequence[Row]) -> str:
    """Return one Markdown table a data set and table; "" without rows."""
    parts = []
    for table, dataset in dict.fromkeys((row.table, row.dataset) for row in rows):
        block = [row for row in rows if (row.table, row.dataset) == (table, dataset)]
        ceiling = next((row.PSNR.value for row in block if row.defense == BASELINE), float("nan"))
        parts.append(f"### {dataset_title(dataset)}, {table}\n")
        parts.append(
            f"{block[0].images} victims a cell. Floor (best blind guess) {block[0].floor:.1f} dB, ceiling (no "
            f"defense) {ceiling:.1f} dB. Success: above {SUCCESS_PSNR:.0f} dB and an SSIM of {SUCCESS_SSIM}.\n"
        )
        parts.append("| defense | adversary | best strategy | PSNR dB | SSIM | success |")
        parts.append("|---|---|---|---|---|---|")
        parts += [_line(row) for row in block]
        parts.append("")
    if any(row.unsound for row in rows):
        parts.append("† Some searches stalled or ran out of budget (number in brackets): no protection follows.")
    return "\n".join(parts) + "\n" if parts else ""


def _line(row: Row) -> str:
    mark = f" †({row.unsound})" if row.unsound else ""
    strategy = row.strategy or "plain" if row.told else "nothing more to tell"
    return (
        f"| {look(row.defense).short} | {row.adversary} | {strategy}{mark} | "
        f"{row.PSNR.value:.1f} ±{row.PSNR.margin:.1f} | {row.SSIM.value:.2f} ±{row.SSIM.margin:.2f} | "
        f"{row.success.value:.0%} ({row.success.low:.0%} to {row.success.high:.0%}) |"
    )
