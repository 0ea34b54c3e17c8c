"""Figures of a sweep: the frontier, and what each setting does."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.ablation import Importance, marginal
from analysis.frontier import Point, by_strength, floors_of
from analysis.names import BASELINE, dataset_title, look, ordered_columns
from analysis.style import FAINT, INK, new_figure
from analysis.sweeps import SweepResults

DOMINATED = "#c4c4c4"


def draw_frontier(sweep: SweepResults, found: Sequence[Point], metric: str) -> Figure:
    """Draw ACC against PSNR or SSIM: a row a data set, a column an adversary, a curve a defense."""
    rows = list(dict.fromkeys(p.dataset for p in found))
    columns = list(dict.fromkeys(p.adversary for p in found))
    figure = new_figure(1.2 + 3.6 * len(columns), 0.9 + 3.0 * len(rows))
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharey="row", sharex=True)
    floors = floors_of(sweep, "floor" if metric == "PSNR" else "floor_SSIM")
    for line, dataset in zip(axes, rows, strict=True):
        for panel, adversary in zip(line, columns, strict=True):
            mine = [p for p in found if (p.dataset, p.adversary) == (dataset, adversary)]
            _panel(panel, mine, metric, floors[dataset])
            panel.set_title(f"{dataset_title(dataset)}, {adversary} attacker")
        line[0].set_ylabel("accuracy, %")
    for panel in axes[-1]:
        panel.set_xlabel("PSNR of the strongest attack, dB (left is safer)" if metric == "PSNR" else "SSIM")
    handles = {h.get_label(): h for line in axes for panel in line for h in panel.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def _panel(panel: Axes, found: Sequence[Point], metric: str, floor: float) -> None:
    panel.axvline(floor, color=FAINT, linewidth=1, linestyle=":", label="floor: best blind guess")
    names = ordered_columns(p.defense for p in found)
    for name in names:
        own = by_strength([p for p in found if p.defense == name])
        colour = look(name, names).colour
        x = [getattr(p, metric).value for p in own]
        y = [100 * p.ACC.value for p in own]
        if name == BASELINE:
            panel.axvline(x[0], color=INK, linewidth=1, linestyle="--", label="ceiling: no defense")
        panel.plot(x, y, color=colour, linewidth=1.2, alpha=0.7, label=look(name, names).short)
        for point, at, height in zip(own, x, y, strict=True):
            _mark(panel, point, metric, at, height, colour if point.efficient else DOMINATED)


def _mark(panel: Axes, point: Point, metric: str, x: float, y: float, colour: str) -> None:
    across, up = getattr(point, metric), point.ACC
    panel.errorbar(
        x,
        y,
        xerr=[[x - across.low], [across.high - x]] if across.has_interval else None,
        yerr=[[y - 100 * up.low], [100 * up.high - y]] if up.has_interval else None,
        color=colour,
        marker="o" if point.unsound == 0 else "x",
        markersize=5,
        elinewidth=0.8,
        zorder=3 if point.efficient else 2,
    )


def draw_ablation(sweep: SweepResults, figures: pd.DataFrame, metrics: Sequence[str]) -> Figure | None:
    """Draw each figure against each setting that varies, the others averaged over; None if nothing varies."""
    paths = [path for path in sweep.varied if figures[path].nunique() > 1]
    if not paths:
        return None
    figure = new_figure(1.0 + 2.5 * len(paths), 0.6 + 2.0 * len(metrics))
    axes = figure.subplots(len(metrics), len(paths), squeeze=False, sharey="row", sharex="col")
    for line, metric in zip(axes, metrics, strict=True):
        for panel, path in zip(line, paths, strict=True):
            means = marginal(figures, path, metric)
            numeric = pd.api.types.is_numeric_dtype(means[path])
            across = means[path] if numeric else range(len(means))
            line_style = "-" if numeric else ""
            panel.errorbar(
                across,
                means["mean"],
                yerr=means["margin"],
                color=INK,
                marker="o",
                markersize=4,
                linestyle=line_style,
                elinewidth=0.9,
            )
            if not numeric:
                panel.set_xticks(list(across), [str(value) for value in means[path]], rotation=30, ha="right")
            elif (means[path] > 0).all() and means[path].max() >= 100 * means[path].min():
                panel.set_xscale("log")
        line[0].set_ylabel(metric)
    for panel, path in zip(axes[-1], paths, strict=True):
        panel.set_xlabel(path)
    return figure


def draw_importance(found: Sequence[Importance]) -> Figure | None:
    """Draw how much of each figure's variation each setting explains; None if nothing could be told."""
    if not found:
        return None
    metrics = list(dict.fromkeys(one.metric for one in found))
    paths = list(dict.fromkeys(one.path for one in found))
    figure = new_figure(1.5 + 2.6 * len(metrics), 0.8 + 0.35 * len(paths))
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for panel, metric in zip(axes, metrics, strict=True):
        own = {one.path: one for one in found if one.metric == metric}
        bars = [own[path] for path in paths]
        panel.barh(paths, [b.mean for b in bars], xerr=[b.std for b in bars], color="#56a7dc")
        panel.set_title(metric)
        panel.set_xlabel("loss of R² when shuffled")
        panel.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return figure
