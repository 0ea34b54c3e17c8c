"""Charts of a comparison: what the attacks reach, how the models learn, what a round costs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cells import flag_counts
from analysis.grids import reconstruction_grid
from analysis.load import Comparison
from analysis.names import GUESSES, dataset_title, look, ordered_columns, table_name
from analysis.statistics import Estimate
from analysis.style import FAINT, INK, css_width, look_and_feel, name_rows, new_figure, save
from analysis.summary import Block, Column, blocks_of


@dataclass(frozen=True)
class Picture:
    """A figure on disk.

    Attributes:
        kind: `psnr`, `grid`, `accuracy` or `overhead`.
        table: Table that it belongs to.
        path: The PNG.
        width: Natural width in CSS pixels.
        caption: What it shows, for readers and for those who cannot see it.
    """

    kind: str
    table: str
    path: Path
    width: int
    caption: str


def draw_all(comparison: Comparison, blocks: list[Block], folder: Path) -> list[Picture]:
    """Draw every figure that the comparison has data for, as PNG files in `folder`."""
    pictures = []
    with look_and_feel():
        for table in dict.fromkeys(block.table for block in blocks):
            mine = blocks_of(blocks, table)
            for kind, (draw, caption) in CHARTS.items():
                figure = draw(comparison, mine)
                if figure is not None:
                    path = save(figure, folder / f"{kind}_{table}.png")
                    pictures.append(
                        Picture(kind, table, path, css_width(figure), f"Table {table_name(table)}. {caption}")
                    )
            pictures += [p for block in mine if (p := _grid_picture(comparison, block, folder))]
    return pictures


def _grid_picture(comparison: Comparison, block: Block, folder: Path) -> Picture | None:
    drawn = reconstruction_grid(comparison, block)
    if drawn is None:
        return None
    figure, caption = drawn
    path = save(figure, folder / f"grid_{block.table}_{block.dataset}.png")
    return Picture("grid", block.table, path, css_width(figure), caption)


def psnr_dots(comparison: Comparison, blocks: list[Block]) -> Figure | None:
    """One dot an image, mean and interval a defense; the floor and the ceiling as lines."""
    shown = [block for block in blocks if any(column.images for column in block.every)]
    if not shown:
        return None
    names = _columns(shown, lambda column: column.images > 0)
    figure, panels = _panels(shown, len(names))
    for axes, block in zip(panels, shown, strict=True):
        _psnr_panel(axes, comparison, block, names)
    name_rows(panels, [look(name, names).long for name in names], [look(n, names).colour for n in names])
    panels[0].set_xlim(left=0)
    quantity = "PSNR of the reconstruction in dB"
    _explain(figure, shown, "PSNR", quantity, "shaded: no better than guessing", "solid line: no defense")
    return figure


def _psnr_panel(axes: Axes, comparison: Comparison, block: Block, names: list[str]) -> None:
    images = comparison.part(comparison.images, block.table, block.dataset)
    for row, name in enumerate(names):
        column = _find(block, name)
        score = column.scores["PSNR"] if column else None
        if column is None or score is None or score.estimate is None:
            continue
        values = images.loc[images["column"] == name, "PSNR"].to_numpy()
        colour = look(name, names).colour
        axes.scatter(values, row + _jitter(len(values)), s=9, color=colour, alpha=0.3, linewidths=0)
        _interval_mark(axes, row, score.estimate, colour)
        if score.paper is not None:
            axes.plot(score.paper, row, "o", mfc="none", mec=INK, ms=7, mew=1.1, zorder=4)
        if column.flagged:
            text = f"† {flag_counts(column)}"
            axes.annotate(text, (1, row + 0.36), xycoords=("axes fraction", "data"), ha="right", fontsize=6.5)
    _reference_lines(axes, block)
    axes.set_title(dataset_title(block.dataset))


def _reference_lines(axes: Axes, block: Block) -> None:
    if "PSNR" in block.floors:
        guess, floor = block.floors["PSNR"]
        axes.axvline(floor, color=INK, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        axes.axvspan(0, floor, color="#eef4ee", zorder=0)
        axes.annotate(
            f"floor: {GUESSES.get(guess, guess)}", (floor, 0.99), xycoords=("data", "axes fraction"),
            xytext=(3, 0), textcoords="offset points", rotation=90, fontsize=6.5, color=FAINT, va="top",
        )  # fmt: skip
    ceiling = block.baseline.scores["PSNR"].estimate
    if ceiling is not None:
        axes.axvline(ceiling.value, color=look("none").colour, linewidth=1.1, zorder=1)


def _interval_mark(axes: Axes, row: int, estimate: Estimate, colour: str) -> None:
    if estimate.has_interval:
        axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=3, zorder=3)
    axes.plot(estimate.value, row, "D", color=colour, mec="white", ms=6, zorder=5)


def _jitter(count: int) -> np.ndarray:
    """Offsets that spread dots evenly without chance: multiples of the golden ratio, modulo 1."""
    return (np.arange(count) * 0.6180339887 % 1 - 0.5) * 0.5


def accuracy_curves(comparison: Comparison, blocks: list[Block]) -> Figure | None:
    """Accuracy on the test set against rounds: the mean over seeds, and a band from the lowest to the highest."""
    rounds = comparison.part(comparison.rounds, blocks[0].table)
    if "ACC" not in rounds or rounds["ACC"].dropna().empty:
        return None
    rounds = rounds.dropna(subset=["ACC"])
    shown = [block for block in blocks if block.dataset in set(rounds["dataset"])]
    names = ordered_columns(rounds["defense"].unique())
    figure, panels = _panels(shown, 6, share=False)
    for axes, block in zip(panels, shown, strict=True):
        _accuracy_panel(axes, comparison.part(rounds, block.table, block.dataset), names)
        axes.set_title(dataset_title(block.dataset))
        axes.set_xlabel("round")
    panels[0].set_ylabel("ACC in %")
    handles, labels = _legend_entries(panels)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8)
    return figure


def _accuracy_panel(axes: Axes, rounds: pd.DataFrame, names: list[str]) -> None:
    for name in names:
        curve = rounds[rounds["defense"] == name].groupby("round")["ACC"].agg(["mean", "min", "max"]) * 100
        if curve.empty:
            continue
        style = (0, (5, 2)) if name == "none" else "-"
        colour = look(name, names).colour
        axes.plot(curve.index, curve["mean"], color=colour, linestyle=style, label=look(name, names).long)
        axes.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.15, linewidth=0)


def _legend_entries(panels: list[Axes]) -> tuple[list[Artist], list[str]]:
    found = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    return list(found.values()), list(found)


def overhead_bars(comparison: Comparison, blocks: list[Block]) -> Figure | None:
    """What a defense adds to a round: the median over paired rounds and their spread."""
    shown = [b for b in blocks if any(column.scores["ART"].estimate for column in b.columns.values())]
    if not shown:
        return None
    names = _columns(shown, lambda column: column.scores["ART"].estimate is not None)
    figure, panels = _panels(shown, len(names))
    for axes, block in zip(panels, shown, strict=True):
        _overhead_panel(axes, block, names)
    name_rows(panels, [look(name, names).long for name in names], [look(n, names).colour for n in names])
    _explain(figure, shown, "ART", "round time over no defense in %", "line: quartiles of paired rounds")
    return figure


def _overhead_panel(axes: Axes, block: Block, names: list[str]) -> None:
    for row, name in enumerate(names):
        column = _find(block, name)
        score = column.scores["ART"] if column else None
        if score is None or score.estimate is None:
            continue
        ours = score.estimate
        axes.barh(row, ours.value, height=0.55, color=look(name, names).colour, alpha=0.85)
        if ours.has_interval:
            axes.plot([ours.low, ours.high], [row, row], color=INK, linewidth=1.2)
        if score.paper is not None:
            axes.plot(score.paper, row, "o", mfc="white", mec=INK, ms=6.5, mew=1.1, zorder=4)
    axes.axvline(0, color="#bbbbbb", linewidth=1)
    axes.set_title(dataset_title(block.dataset))


def _panels(blocks: list[Block], rows: int, share: bool = True) -> tuple[Figure, list[Axes]]:
    width = 2.6 + 2.9 * len(blocks) if len(blocks) > 1 else 6.6
    figure = new_figure(width, max(2.4, 0.42 * rows + 1.1))
    grid = figure.subplots(1, len(blocks), sharey=share, sharex=share, squeeze=False)
    return figure, list(grid[0])


def _explain(figure: Figure, blocks: list[Block], metric: str, quantity: str, *marks: str) -> None:
    papers = [column.scores[metric].paper for block in blocks for column in block.every]
    rings = () if all(paper is None for paper in papers) else ("ring: the slides’ figure",)
    figure.supxlabel("   ·   ".join((quantity, *marks, *rings)), fontsize=8)


def _columns(blocks: list[Block], keep: Callable[[Column], bool]) -> list[str]:
    return ordered_columns({column.name for block in blocks for column in block.every if keep(column)})


def _find(block: Block, name: str) -> Column | None:
    return next((column for column in block.every if column.name == name), None)


CHARTS: dict[str, tuple[Callable[[Comparison, list[Block]], Figure | None], str]] = {
    "psnr": (
        psnr_dots,
        "PSNR of every reconstructed image (dots), mean and 95 % interval (diamond and bar), the slides’ figure "
        "(ring), the best blind guess (dashed line) and what the attack reaches without a defense (solid line).",
    ),
    "accuracy": (
        accuracy_curves,
        "Accuracy on the test set against rounds: mean over seeds, band from the lowest seed to the highest.",
    ),
    "overhead": (
        overhead_bars,
        "Round time over training without a defense: median of paired rounds (bar), their quartiles (line), the "
        "slides’ figure (ring).",
    ),
}
