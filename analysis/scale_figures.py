"""Figures of the scalability study: round time, speed-up, where the time goes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from analysis.names import look
from analysis.scale_tables import speed_up
from analysis.style import FAINT, INK, name_rows, new_figure
from fedsim.scale.cost_model import Point, fit
from fedsim.scale.grid import Cell, ScaleConfig
from fedsim.scale.measure import PARTS

WORKER_COLOURS = ("#0072b2", "#d98e00", "#009e73", "#d55e00", "#b5528f", "#56a7dc", "#7a5195", "#8c6d31")
PART_COLOURS = dict(zip(PARTS, ("#0072b2", "#d98e00", "#009e73", "#b5528f", "#c4c4c4"), strict=True))


def grid_rows(table: pd.DataFrame, cells: Sequence[Cell]) -> pd.DataFrame:
    """Return the rows of some cells that are measured."""
    keys = pd.DataFrame([vars(cell) for cell in cells])
    return table.merge(keys, on=list(keys.columns)) if len(keys) else table.head(0)


def _strong(table: pd.DataFrame, config: ScaleConfig) -> pd.DataFrame:
    """Return the cells of strong scaling at the first width, by size."""
    first = config.model_copy(update={"widths": config.widths[:1], "weak": 0})
    return grid_rows(table, first.cells()).sort_values(["clients", "workers"])


def _by(rows: pd.DataFrame, name: str) -> list[tuple[int, pd.DataFrame]]:
    return [(int(value), rows[rows[name] == value]) for value in sorted(rows[name].unique())]


def draw_round_time(table: pd.DataFrame, config: ScaleConfig, points: dict[str, list[Point]]) -> Figure:
    """Draw round time against clients a round, a curve a number of workers, a panel a defense."""
    figure = new_figure(1.4 + 3.3 * len(config.defenses), 3.4)
    axes = figure.subplots(1, len(config.defenses), squeeze=False, sharey=True)[0]
    strong, actors = _strong(table, config), grid_rows(table, config.actor_cells())
    sizes = sorted({*strong["clients"], *(actors["clients"] if len(actors) else ())})
    for panel, defense in zip(axes, config.defenses, strict=True):
        own = strong[strong["defense"] == defense]
        for colour, (workers, curve) in zip(WORKER_COLOURS, _by(own, "workers"), strict=False):
            _curve(panel, curve, colour, f"{workers} worker{'s' if workers > 1 else ''}")
            _fitted(panel, curve, points[defense], colour)
        alone = actors[actors["defense"] == defense]
        if len(alone):
            _curve(panel, alone, INK, "one actor a client", "s")
        panel.set_title(look(defense, config.defenses).short)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_xlabel("clients a round")
    axes[0].plot([], [], color=FAINT, linewidth=1, label="cost model")
    axes[0].set_ylabel("round time, s")
    handles = {h.get_label(): h for panel in axes for h in panel.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def _curve(panel: Axes, rows: pd.DataFrame, colour: str, label: str, marker: str = "o") -> None:
    spread = [rows["seconds"] - rows["seconds_low"], rows["seconds_high"] - rows["seconds"]]
    panel.errorbar(
        rows["clients"],
        rows["seconds"],
        yerr=spread,
        color=colour,
        marker=marker,
        markersize=4,
        linestyle="none",
        elinewidth=0.9,
        label=label,
    )


def _fitted(panel: Axes, rows: pd.DataFrame, points: Sequence[Point], colour: str) -> None:
    """Draw the cost model through a curve's sizes, when there are enough rounds to fit it."""
    if len({(point.busiest, point.calls) for point in points}) < 3:
        panel.plot(rows["clients"], rows["seconds"], color=colour, linewidth=1, alpha=0.6)
        return
    model, by_time = fit(points), {point.seconds: point for point in points}
    fitted = [model.predict(by_time[float(seconds)]) for seconds in rows["seconds"]]
    panel.plot(rows["clients"], fitted, color=colour, linewidth=1, alpha=0.6)


def draw_speed_up(table: pd.DataFrame, config: ScaleConfig) -> Figure | None:
    """Draw strong scaling (speed-up) and weak scaling (efficiency) against ideal; None with one worker count."""
    if len(config.workers) < 2:
        return None
    figure = new_figure(8.2, 3.4)
    strong_panel, weak_panel = figure.subplots(1, 2)
    first, last = min(config.workers), max(config.workers)
    strong = _strong(table, config)
    strong = strong.assign(faster=speed_up(strong))
    defense = config.defenses[0]
    own = strong[strong["defense"] == defense]
    for colour, (clients, curve) in zip(WORKER_COLOURS, _by(own, "clients"), strict=False):
        strong_panel.plot(
            curve["workers"], curve["faster"], color=colour, marker="o", label=f"{clients:,} clients"
        )
    strong_panel.plot([first, last], [1, last / first], color=FAINT, linestyle="--", label="ideal")
    strong_panel.set_title(f"Strong scaling, {look(defense).short}")
    strong_panel.set_ylabel(f"speed-up over {first} worker{'s' if first > 1 else ''}")
    _weak(weak_panel, table, config)
    for panel, corner in ((strong_panel, "upper left"), (weak_panel, "lower left")):
        panel.set_xlabel("workers")
        panel.set_xticks(sorted(config.workers))
        panel.legend(loc=corner)
    return figure


def _weak(panel: Axes, table: pd.DataFrame, config: ScaleConfig) -> None:
    rows = grid_rows(table, [cell for cell in config.cells() if cell.clients == config.weak * cell.workers])
    for defense, curve in rows.groupby("defense"):
        # The widest: auto widths differ while a cohort is small.
        curve = (
            curve.sort_values("clients_per_chunk").drop_duplicates("workers", keep="last").sort_values("workers")
        )
        colour = look(str(defense), config.defenses).colour
        efficiency = curve["seconds"].iloc[0] / curve["seconds"]
        panel.plot(curve["workers"], efficiency, color=colour, marker="o", label=look(str(defense)).short)
    panel.axhline(1, color=FAINT, linestyle="--", label="ideal")
    panel.set_ylim(0, 1.05 * max(1.0, *panel.get_ylim()))
    panel.set_title(f"Weak scaling, {config.weak} clients a worker")
    panel.set_ylabel("efficiency")


def draw_parts(table: pd.DataFrame, config: ScaleConfig) -> Figure:
    """Draw where the time of a round goes, a bar a size and number of workers, a panel a defense."""
    strong = _strong(table, config)
    names = list(
        dict.fromkeys((int(c), int(w)) for c, w in zip(strong["clients"], strong["workers"], strict=True))
    )
    figure = new_figure(1.8 + 3.0 * len(config.defenses), 1.0 + 0.3 * len(names))
    axes = figure.subplots(1, len(config.defenses), squeeze=False, sharey=True)[0]
    for panel, defense in zip(axes, config.defenses, strict=True):
        own = strong[strong["defense"] == defense]
        where = [names.index((int(c), int(w))) for c, w in zip(own["clients"], own["workers"], strict=True)]
        left = np.zeros(len(own))
        for part in PARTS:
            widths = 100 * (own[f"{part}_seconds"] / own["seconds"]).clip(lower=0).to_numpy()
            panel.barh(where, widths, left=left, color=PART_COLOURS[part], label=part, height=0.7)
            left = left + widths
        panel.set_title(look(defense, config.defenses).short)
        panel.set_xlabel("share of the round time, %")
        panel.set_xlim(0, 100)
    labels = [f"{clients:,} clients, {workers} worker{'s' if workers > 1 else ''}" for clients, workers in names]
    name_rows(list(axes), labels, [INK] * len(labels))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def draw_widths(table: pd.DataFrame, config: ScaleConfig) -> Figure | None:
    """Draw round time against clients a chunk, for the most workers; None with one width."""
    if len(config.widths) < 2:
        return None
    rows = grid_rows(table, [c for c in config.cells() if c.workers == max(config.workers)])
    rows = rows[(rows["defense"] == config.defenses[0]) & rows["clients"].isin(config.clients)]
    figure = new_figure(5.2, 3.4)
    panel = figure.subplots()
    for colour, (clients, curve) in zip(WORKER_COLOURS, _by(rows, "clients"), strict=False):
        curve = curve.sort_values("clients_per_chunk")
        a_client = 1000 * curve["seconds"] / curve["clients"]
        panel.plot(curve["clients_per_chunk"], a_client, color=colour, marker="o", label=f"{clients:,} clients")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("clients a chunk")
    panel.set_ylabel("round time a client, ms")
    panel.set_title(f"Chunk width, {max(config.workers)} workers, {look(config.defenses[0]).short}")
    panel.legend()
    return figure
