"""What the attacker sees: reconstructions beside their originals, in the manner of the slides' figure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cells import FLAG
from analysis.frames import NAIVE, CellKey
from analysis.load import Comparison
from analysis.names import (
    BASELINE,
    MUTED_SUFFIX,
    attack_title,
    dataset_title,
    is_muted,
    look,
    ordered_columns,
)
from analysis.style import FAINT, INK, new_figure
from analysis.summary import Block

MOST_VICTIMS = 6
INCH = 0.62
"""Side of one picture in the grid."""
GAP = 0.1
CAPTION_SPACE = 0.32
"""Space beside and below a picture, as shares of its side."""
NAMES_SPACE = 2.5
"""Space for the rows' names, in sides of a picture."""


@dataclass(frozen=True)
class Row:
    """One row of the grid.

    Attributes:
        column: The tables' column that it illustrates.
        originals: uint8 [n, C, H, W].
        images: What the attack returned for each, same shape.
        captions: Text under each.
        psnr: Mean PSNR over all of the row's images, dB.
    """

    column: str
    originals: np.ndarray
    images: np.ndarray
    captions: list[str]
    psnr: float


def reconstruction_grid(comparison: Comparison, block: Block) -> tuple[Figure, str] | None:
    """Draw a block's grid for its first seed and audited round.

    Returns:
        The figure and its caption; None when no reconstruction was logged.
    """
    images = comparison.part(comparison.images, block.table, block.dataset)
    images = images[images["column"] != ""]
    if images.empty:
        return None
    seed, round_index = int(images["seed"].min()), int(images["round"].min())
    names = ordered_columns(images["column"])
    rows = [row for name in names if (row := _row(comparison, block, name, seed, round_index))]
    if not rows:
        return None
    title = f"{attack_title(_own_attack(images))} on {dataset_title(block.dataset)}"
    caption = (
        f"{title}: originals, and what the attack makes of what the server saw (seed {seed}, round "
        f"{round_index}). PSNR in dB under each; {FLAG} marks an attack that stalled or ran out of budget."
    )
    return _draw(rows, title), caption


def _own_attack(images: pd.DataFrame) -> str:
    return next(str(label) for label in images["attack"] if not is_muted(str(label)))


def _row(comparison: Comparison, block: Block, name: str, seed: int, round_index: int) -> Row | None:
    images = comparison.part(comparison.images, block.table, block.dataset)
    audits = images[(images["column"] == name) & (images["seed"] == seed) & (images["round"] == round_index)]
    key = CellKey(block.table, block.dataset, name.removesuffix(MUTED_SUFFIX) if is_muted(name) else name, seed)
    if audits.empty:
        return None
    attack = str(audits["attack"].iloc[0])
    arrays = comparison.reconstructions(key, attack, NAIVE, round_index)
    if arrays is None:
        return None
    captions = [
        f"{psnr:.1f}{FLAG if stalled or exhausted else ''}"
        for psnr, stalled, exhausted in zip(audits["PSNR"], audits["stalled"], audits["exhausted"], strict=True)
    ]
    return Row(name, *arrays, captions, float(audits["PSNR"].mean()))


def _draw(rows: list[Row], title: str) -> Figure:
    reference = next((row for row in rows if row.column == BASELINE), rows[0])
    originals = list(reference.originals[:MOST_VICTIMS])
    lines = [(originals, [""] * len(originals)), *(_matched(row, originals) for row in rows)]
    height, width = originals[0].shape[1:]
    down, right = round(height * (1 + CAPTION_SPACE)), round(width * (1 + GAP))
    margin = round(width * NAMES_SPACE)
    # One canvas, not an axes for each picture: laying out eighty axes takes matplotlib ten seconds.
    canvas = np.full((down * len(lines), margin + right * len(originals), 3), 255, np.uint8)
    figure = new_figure(INCH * canvas.shape[1] / width, 0.4 + INCH * canvas.shape[0] / height)
    axes = figure.subplots()
    for row, (images, captions) in enumerate(lines):
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            top, left = row * down, margin + column * right
            if image is not None:
                canvas[top : top + height, left : left + width] = _as_rgb(image)
            axes.text(left + width / 2, top + height * 1.03, caption, ha="center", va="top", fontsize=7.5)
    _name_rows(axes, rows, margin, down, height)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _matched(row: Row, originals: list[np.ndarray]) -> tuple[list[np.ndarray | None], list[str]]:
    """Return the row's picture and caption for each original; nothing for a victim that it lacks.

    Two cells show the same victim only if they hold the same original; its position alone does not tell.
    """
    places = [
        next((at for at, own in enumerate(row.originals) if np.array_equal(own, original)), None)
        for original in originals
    ]
    images = [None if at is None else row.images[at] for at in places]
    return images, ["" if at is None else row.captions[at] for at in places]


def _as_rgb(image: np.ndarray) -> np.ndarray:
    return np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)


def _name_rows(axes: Axes, rows: list[Row], margin: int, pitch: int, height: int) -> None:
    names = [row.column for row in rows]
    titles = [("Original", INK, "")]
    titles += [
        (_wrapped(look(r.column, names).long), look(r.column, names).colour, f"{r.psnr:.1f} dB") for r in rows
    ]
    for row, (name, colour, detail) in enumerate(titles):
        place: dict[str, Any] = {
            "xy": (margin, row * pitch + height / 2),
            "textcoords": "offset points",
            "ha": "right",
        }
        axes.annotate(name, **place, xytext=(-8, 0), va="center", fontsize=8, color=colour, fontweight="bold")
        below = -10 if "\n" in name else -5
        axes.annotate(detail, **place, xytext=(-8, below), va="top", fontsize=7.5, color=FAINT)


def _wrapped(name: str) -> str:
    return name.replace(" (", "\n(").replace(" by the", "\nby the")
