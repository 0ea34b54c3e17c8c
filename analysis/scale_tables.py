"""The scalability study as tables, in Markdown and on the terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
from rich.console import Console
from rich.table import Table

from fedsim.errors import RunError
from fedsim.scale.cost_model import CostModel, Network, Point, extrapolate, fit, hold_out
from fedsim.scale.grid import ScaleConfig
from fedsim.scale.load import BUSY
from fedsim.scale.measure import PARTS

BYTES_PER_SECOND = 1.25e9
"""Assumed rate of the server's link on a cluster: 10 Gbit/s."""
WORKERS_PER_NODE = 32
"""Assumed workers a node of a cluster."""
LARGE = 10_000
"""A cohort that is always extrapolated to."""
MIB = 2**20
INLINE_BYTES = 100 * 1024
"""Ray sends smaller values within the call (`max_direct_call_object_size`)."""
CELL = ("clients", "workers", "clients_per_chunk", "defense")
HEADINGS = ("clients", "workers", "a chunk", "defense")


@dataclass(frozen=True)
class Section:
    """A table with a title above and notes below; the first columns are text, the rest figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def speed_up(table: pd.DataFrame) -> pd.Series:
    """Return how much faster each cell is than the same with the fewest workers; NaN where there is no other."""
    groups = table.sort_values("workers").groupby(["clients", "clients_per_chunk", "defense"])["seconds"]
    first = groups.transform("first").where(groups.transform("size") > 1)
    return first.reindex(table.index) / table["seconds"]


def sections(
    table: pd.DataFrame, config: ScaleConfig, points: dict[str, list[Point]], left_out: Sequence[str]
) -> list[Section]:
    """Return all tables of a study."""
    place = {defense: at for at, defense in enumerate(config.defenses)}
    ordered = table.sort_values(["clients", "workers", "clients_per_chunk"]).sort_values(
        "defense", key=lambda names: names.map(place), kind="stable"
    )
    return [_times(ordered, left_out), _parts(ordered), _memory(ordered), *_model(ordered, config, points)]


def _cell(row: pd.Series) -> list[str]:
    return [f"{row[name]:,}" if name != "defense" else str(row[name]) for name in CELL]


def _disturbed(table: pd.DataFrame) -> Iterator[str]:
    count = int((table["others_cpu"] > BUSY).sum())
    if count:
        yield (
            f"The machine was busy with other things in {count} of {len(table)} cells (others above {BUSY:.0%}): "
            "their times, and what is fitted on them, are not those of a quiet machine."
        )


def _optional(value: float, form: str) -> str:
    return "" if pd.isna(value) else format(value, form)


def _times(table: pd.DataFrame, left_out: Sequence[str]) -> Section:
    rows = [
        [
            *_cell(row),
            f"{row['seconds']:.4g}",
            f"{row['seconds_low']:.4g} – {row['seconds_high']:.4g}",
            f"{row['rounds']}",
            f"{row['clients'] / row['seconds']:.0f}",
            _optional(row["speed_up"], ".2f"),
            _optional(row["over_none"], "+.1%"),
            _optional(row["others_cpu"], ".0%"),
        ]
        for _, row in table.assign(speed_up=speed_up(table)).iterrows()
    ]
    columns = (*HEADINGS, "round s", "quartiles", "rounds", "clients/s", "speed-up", "over none", "others")
    notes = [
        "Speed-up: against the same cohort, chunk width and defense with the fewest workers, on the same Ray "
        "where neither is one actor a client. Over none: median of the paired ratios to no defense, less one. "
        "Others: share of the machine's CPU time that other processes took meanwhile.",
        *_disturbed(table),
        *(f"Left out: {line}." for line in left_out),
    ]
    return Section("Round time", columns, rows, notes)


def _parts(table: pd.DataFrame) -> Section:
    rows = [
        [*_cell(row), *(f"{row[f'{part}_seconds'] / row['seconds']:.1%}" for part in PARTS)]
        for _, row in table.iterrows()
    ]
    note = (
        "Shares of the round time. Local and defense: a worker's mean; aggregate and compensate: the server; "
        "other: Ray, drawing the cohort, waiting for the last chunk, the server's step."
    )
    return Section("Where the time goes", (*HEADINGS, *PARTS), rows, [note])


def _memory(table: pd.DataFrame) -> Section:
    memory = ("worker_bytes", "server_bytes", "driver_bytes", "store_bytes_held")
    rows = [
        [
            *_cell(row),
            *(f"{row[name] / MIB:.0f}" for name in memory),
            *(f"{value / MIB:.2f}" for value in _moved(row)),
        ]
        for _, row in table.iterrows()
    ]
    columns = (*HEADINGS, "worker", "server", "driver", "store", "to store", "out", "sums", "uploads")
    notes = [
        "MiB. Processes: memory that no other process shares, after the last round. Store: held in the object "
        "stores of all nodes then, and put there by a round, as Ray counts it.",
        "Out and sums: weights to the nodes and sums back, by size; weights under 100 KiB travel with each "
        "call instead, beside the store. Uploads: what the clients of a real federation would send.",
    ]
    return Section("Memory and bytes", columns, rows, notes)


def _moved(row: pd.Series) -> tuple[float, float, float, float]:
    """Return the bytes of a round: put into the stores, weights out, sums back, and uploads of real clients."""
    weights, calls = row["weights_bytes"], row["calls"]
    copies = calls if weights < INLINE_BYTES else row["nodes"]
    return row["store_bytes_round"], copies * weights, calls * weights, row["uploaded_bytes"]


def _model(table: pd.DataFrame, config: ScaleConfig, points: dict[str, list[Point]]) -> Iterator[Section]:
    models: dict[str, CostModel] = {}
    for defense, own in points.items():
        try:
            models[defense] = fit(own)
        except RunError:
            continue
    if not models:
        return
    rows = [
        [defense, *(f"{1000 * value:.3f}" for value in (m.fixed, m.per_client, m.per_call))]
        for defense, m in models.items()
    ]
    formula = "T = fixed + per client · clients of the busiest worker + per call · calls, fitted on all sizes."
    yield Section("Cost model, ms", ("defense", "fixed", "per client", "per call"), rows, [formula])
    checked = _held_out(points)
    if checked.rows:
        yield checked
    yield _cluster(table, config, models)


def _held_out(points: dict[str, list[Point]]) -> Section:
    rows = [
        [defense, f"{one.clients:,}", f"{len(one.errors)}", f"{one.median:.1%}", f"{one.worst:+.1%}"]
        for defense, own in points.items()
        for one in hold_out(own)
    ]
    columns = ("defense", "held-out clients", "cells", "median error", "largest error")
    note = "Each size is predicted by the model fitted on all other sizes; errors are predicted / measured − 1."
    return Section("Cost model, checked on a held-out size", columns, rows, [note])


def _cluster(table: pd.DataFrame, config: ScaleConfig, models: dict[str, CostModel]) -> Section:
    weights = float(table["weights_bytes"].iloc[0])
    network = Network(weights, weights, BYTES_PER_SECOND, WORKERS_PER_NODE)
    rows = []
    for defense, model in models.items():
        for clients in sorted({max(config.clients), LARGE}):
            width = config.chunk_width(clients, config.widths[0])
            for one in extrapolate(model, network, clients, width, config.cluster):
                workers = one.point.workers
                rows.append(
                    [defense, f"{clients:,}", f"{workers:,}", f"{one.seconds:.4g}", f"{one.speed_up:.1f}"]
                    + [f"{one.speed_up / workers:.0%}", f"{one.network_seconds:.2g}"]
                )
    columns = ("defense", "clients", "workers", "round s", "speed-up", "of ideal", "of it network s")
    notes = [
        "Predicted, not measured. Assumes: every worker has a core as fast as those measured; the fixed and the "
        "per-call cost stay what they were on this machine; nothing else is shared; chunks as in the study.",
        f"Network: {BYTES_PER_SECOND * 8 / 1e9:.0f} Gbit/s at the server, which carries the weights once a node "
        f"of {WORKERS_PER_NODE} workers and a sum a call, none of it hidden behind the work.",
    ]
    return Section("Extrapolated to a cluster", columns, rows, notes)


def markdown(found: Sequence[Section], heading: Sequence[str]) -> str:
    """Return the tables as Markdown below a title and lines that say what was measured where."""
    parts = [f"# {heading[0]}", "\n".join(f"- {line}" for line in heading[1:])]
    for section in found:
        parts += [f"## {section.title}", _grid(section), *section.notes]
    return "\n\n".join(parts) + "\n"


def _grid(section: Section) -> str:
    lines = [section.columns, ["---"] * len(section.columns), *section.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_sections(found: Sequence[Section], console: Console) -> None:
    """Print the tables."""
    for section in found:
        table = Table(box=None, header_style="bold", title=section.title, title_justify="left", title_style="bold")
        for column in section.columns:
            table.add_column(column, justify="left" if column == "defense" else "right")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
        for note in section.notes:
            console.print(note, style="dim", highlight=False)
        console.print()
