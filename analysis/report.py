"""One page that tells a comparison: everything in one file, nothing loaded from elsewhere."""

import base64
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis.cells import FLAG, INTERVALS, MARKS, Piece, heading, notes, piece
from analysis.contrast import MATERIAL, Difference, differences
from analysis.figures import Picture
from analysis.findings import Finding, attack_of, findings
from analysis.frames import KEY, CellKey
from analysis.load import Comparison
from analysis.names import (
    GUESSES,
    METRICS,
    attack_title,
    dataset_title,
    look,
    ordered_columns,
    table_name,
    table_title,
)
from analysis.settings import settings_groups
from analysis.statistics import Estimate
from analysis.summary import RECOVERED_PSNR, Block, Column, Standing, blocks_of

STANDINGS = {
    "floor": ("●", "no closer than a blind guess"),
    "leaks": ("▲", "closer than a blind guess"),
    "unclear": ("?", "the intervals cannot tell"),
    "uncounted": (FLAG, "shows nothing: attack stalled, out of budget, or failing even without a defense"),
}


@dataclass(frozen=True)
class Section:
    """One of the slides' tables with its figures."""

    name: str
    short: str
    title: str
    attack: str
    blocks: list[Block]
    pictures: dict[str, list[Picture]]


def report_html(comparison: Comparison, blocks: list[Block], pictures: Iterable[Picture]) -> str:
    """Return the report as one HTML page with its figures inside."""
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "data_uri": data_uri,
        "dataset_title": dataset_title,
        "attack_title": attack_title,
        "table_name": table_name,
    }
    apart = sorted((d for d in differences(blocks) if d.material), key=lambda d: -d.size)
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        findings=_findings(comparison, blocks),
        sections=_sections(blocks, list(pictures)),
        glance=_glance(blocks),
        standings=STANDINGS,
        metrics=METRICS,
        look=look,
        heading=heading,
        notes=notes,
        cell=_html_cell,
        floor=_floor,
        marks=MARKS,
        intervals=INTERVALS,
        recovered_psnr=RECOVERED_PSNR,
        material=MATERIAL,
        apart=[_difference_row(difference) for difference in apart],
        settings=settings_groups(comparison.configs),
        runs=_runs(comparison),
        audits=_audits(comparison),
        facts=_facts(comparison),
    )


def _findings(comparison: Comparison, blocks: list[Block]) -> dict[str, list[Finding]]:
    """Return the sentences by the heading that they stand under."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings(comparison, blocks):
        groups.setdefault(finding.about, []).append(finding)
    return groups


def data_uri(path: Path) -> str:
    """Return a PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _sections(blocks: list[Block], pictures: list[Picture]) -> list[Section]:
    sections = []
    for table in dict.fromkeys(block.table for block in blocks):
        mine = blocks_of(blocks, table)
        kinds: dict[str, list[Picture]] = {"psnr": [], "grid": [], "accuracy": [], "overhead": []}
        for picture in pictures:
            if picture.table == table:
                kinds[picture.kind].append(picture)
        sections.append(Section(table, table_name(table), table_title(table), attack_of(mine[0]), mine, kinds))
    return sections


def _glance(blocks: list[Block]) -> list[tuple[str, list[tuple[Standing | None, Column | None]]]]:
    """Return one row a column of the tables: what it shows in each block."""
    names = ordered_columns({column.name for block in blocks for column in block.every if column.images})
    rows = []
    for name in names:
        found = [(block, next((c for c in block.every if c.name == name), None)) for block in blocks]
        rows.append((name, [(block.standing(column) if column else None, column) for block, column in found]))
    return rows


def _html_cell(column: Column, metric: str) -> tuple[Piece, str]:
    """Return a cell's parts and the exact interval for whoever hovers over it."""
    estimate = column.scores[metric].estimate
    return piece(column, metric), _exact(estimate, metric) if estimate and estimate.has_interval else ""


def _exact(estimate: Estimate, metric: str) -> str:
    kind = METRICS[metric]
    return f"{kind.with_unit(estimate.value)}, from {kind.text(estimate.low)} to {kind.text(estimate.high)}"


def _floor(block: Block, metric: str) -> tuple[str, str]:
    """Return the floor's figure and the guess that reaches it; dashes where the metric has none."""
    if metric not in block.floors:
        return "", ""
    guess, value = block.floors[metric]
    return METRICS[metric].text(value), GUESSES.get(guess, guess)


def _difference_row(difference: Difference) -> dict[str, str]:
    kind = METRICS[difference.metric]
    return {
        "where": f"{table_name(difference.table)} · {dataset_title(difference.dataset)}",
        "column": look(difference.column).short,
        "metric": difference.metric,
        "ours": kind.with_unit(difference.ours.value),
        "paper": kind.with_unit(difference.paper),
    }


def _runs(comparison: Comparison) -> list[dict[Hashable, Any]]:
    """Return one row a cell: what it gave, where it is kept and how to run it again."""
    rows: list[dict[Hashable, Any]] = []
    for row in comparison.cells.to_dict("records"):
        key = CellKey(*(row[name] for name in KEY))
        result = comparison.results[key]
        faults = {name: count for name, count in (result.get("faults") or {}).items() if count}
        rows.append(
            {
                **row,
                "key": key,
                "sha": str(result.get("model_sha256", ""))[:12],
                "faults": ", ".join(f"{name} {count}" for name, count in faults.items()) or "none",
                "config": comparison.configs[key],
            }
        )
    return rows


def _audits(comparison: Comparison) -> list[dict[Hashable, Any]]:
    """Return one row for each attack and adversary that any cell was audited by."""
    keys = ["table", "dataset", "defense", "attack", "adversary", "round"]
    grouped = comparison.images.groupby(keys, sort=False)
    summary = grouped.agg(
        images=("PSNR", "size"),
        PSNR=("PSNR", "mean"),
        median=("PSNR", "median"),
        highest=("PSNR", "max"),
        SSIM=("SSIM", "mean"),
        recovered=("PSNR", lambda values: int((values > RECOVERED_PSNR).sum())),
        stalled=("stalled", "sum"),
        exhausted=("exhausted", "sum"),
        iterations=("iterations", "median"),
        seconds=("seconds", "mean"),
    )
    return summary.reset_index().to_dict("records")


def _facts(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Return versions and hardware; where cells ran on different ones, all of them."""
    facts: dict[str, dict[str, list[str]]] = {"versions": {}, "hardware": {}}
    for result in comparison.results.values():
        for kind, found in facts.items():
            for name, value in (result.get(kind) or {}).items():
                values = found.setdefault(name, [])
                values += [] if str(value) in values else [str(value)]
    return {kind: {n: " / ".join(v) for n, v in found.items()} for kind, found in facts.items()}
