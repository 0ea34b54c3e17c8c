"""Defenses against attackers who know of them: the best that each adversary can do.

Whoever knows more can also do what the others do, so an adversary's figure is that of the best strategy among its
own and those of the adversaries who know less: best by mean PSNR over the same victims. The choice looks at the
private images, as a defender must who asks how bad it can get; an attacker could only guess it.
"""

import io
from collections.abc import Sequence
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


def summarise(comparison: Comparison) -> list[Row]:
    """Return one row a defense and adversary; none if the comparison has naive adversaries only."""
    images = comparison.images
    if set(images["adversary"]) <= {"naive"}:
        return []
    floors = comparison.floors.groupby(["table", "dataset", "guess"])["PSNR"].mean()
    rows = []
    for (table, dataset), block in images.groupby(["table", "dataset"], sort=False):
        floor = float(floors.loc[table, dataset].max())
        for defense in ordered_columns(block["defense"]):
            cell = block[block["defense"] == defense]
            for number, adversary in enumerate(ADVERSARIES[: 1 if defense == BASELINE else None]):
                able = cell[cell["adversary"].isin(ADVERSARIES[: number + 1])]
                if len(able):
                    rows.append(_best(able, str(table), str(dataset), defense, adversary, floor))
    return rows


def _best(able: pd.DataFrame, table: str, dataset: str, defense: str, adversary: str, floor: float) -> Row:
    names = able["attack"] + " " + able["strategy"]
    best = str(able.groupby(names)["PSNR"].mean().idxmax())
    own = able[names == best]
    won = (own["PSNR"] > SUCCESS_PSNR) & (own["SSIM"] > SUCCESS_SSIM)
    return Row(
        table,
        dataset,
        defense,
        adversary,
        strategy=best.split(" ")[1],
        told=adversary in set(able["adversary"]),
        PSNR=mean_interval(own["PSNR"], own["seed"]),
        SSIM=mean_interval(own["SSIM"], own["seed"]),
        success=proportion_interval(float(won.mean()), len(own)),
        images=len(own),
        unsound=int((own["stalled"] | own["exhausted"]).sum()),
        floor=floor,
    )


def csv(rows: Sequence[Row]) -> str:
    """Return all rows as CSV; "" without rows."""
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
            **{name: getattr(row, name) for name in ("images", "unsound", "floor")},
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
