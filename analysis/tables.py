"""The two tables of the slides, in their own layout, as Markdown and CSV and on the terminal."""

from collections.abc import Callable

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.cells import FLAG, INTERVALS, LEGEND, ROWS, Piece, heading, notes, piece
from analysis.frames import IMAGE_COLUMNS, KEY
from analysis.load import Comparison
from analysis.names import column_groups, group_title, table_title
from analysis.summary import Block, Column, blocks_of, summarise

BEST = "*"
COLUMNS_A_TABLE = 4
"""Columns of one terminal table: as many as fit 100 characters."""


def markdown(blocks: list[Block]) -> str:
    """Return one table as Markdown, one data set below another."""
    parts = [f"# {table_title(blocks[0].table)}", f"{LEGEND} {INTERVALS}"]
    for block in blocks:
        parts += [f"## {heading(block)}", _markdown_grid(block), "\n".join(f"- {note}" for note in notes(block))]
    return "\n\n".join(parts) + "\n"


def _markdown_grid(block: Block) -> str:
    groups = column_groups(block.columns)
    lines = [["", *(group_title(group) for group in groups)], ["---"] * (len(groups) + 1)]
    for metric, title in ROWS.items():
        lines.append([title, *(_joined(block, group, metric, _markdown_piece) for group in groups)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _joined(block: Block, group: tuple[str, str | None], metric: str, dress: Callable[[Piece], str]) -> str:
    first, second = (block.columns.get(name) if name else None for name in group)
    text = dress(piece(first, metric))
    return text if group[1] is None else f"{text} [{dress(piece(second, metric))}]"


def _markdown_piece(part: Piece) -> str:
    value = f"**{part.value}**" if part.best else part.value
    return " ".join(text for text in (value + part.flag, part.margin, part.paper) if text)


def csv(blocks: list[Block]) -> str:
    """Return one table as CSV: a row a data set and column, each metric with interval, slides' figure and mark."""
    rows = [_csv_row(block, column) for block in blocks for column in (block.baseline, *block.columns.values())]
    return pd.DataFrame(rows).to_csv(index=False)


def _csv_row(block: Block, column: Column) -> dict[str, object]:
    counts = ("images", "seeds", "recovered", "stalled", "exhausted", "capped")
    row: dict[str, object] = {"dataset": block.dataset, "column": column.name, "standing": block.standing(column)}
    row |= {name: getattr(column, name) for name in counts}
    for metric, score in column.scores.items():
        row |= {metric: None, f"{metric}_low": None, f"{metric}_high": None}
        if score.estimate is not None:
            row |= {metric: score.estimate.value}
            row |= {f"{metric}_low": score.estimate.low, f"{metric}_high": score.estimate.high}
        row |= {f"{metric}_paper": score.paper, f"{metric}_best": score.best}
        if metric in block.floors:
            row |= {f"{metric}_floor": block.floors[metric][1], f"{metric}_floor_guess": block.floors[metric][0]}
    return row


def images_csv(comparison: Comparison) -> str:
    """Return one row a reconstructed image, of all attacks and adversaries."""
    return comparison.images[[*KEY, *IMAGE_COLUMNS]].to_csv(index=False)


def print_tables(comparison: Comparison, console: Console) -> None:
    """Print both tables, one data set below another, legible at 100 columns."""
    blocks = summarise(comparison)
    for table in dict.fromkeys(block.table for block in blocks):
        console.print(Text(table_title(table), style="bold underline"))
        for block in blocks_of(blocks, table):
            _print_block(block, console)
    console.print(Text(f"{BEST} stands for bold. {LEGEND}", style="dim"))


def _print_block(block: Block, console: Console) -> None:
    console.print()
    console.print(Text(heading(block), style="bold"))
    groups = column_groups(block.columns)
    for start in range(0, len(groups), COLUMNS_A_TABLE):
        console.print(_terminal_grid(block, groups[start : start + COLUMNS_A_TABLE]))
    for note in notes(block):
        console.print(Text(note, style="yellow" if note.startswith(FLAG) else "dim"))
    console.print()


def _terminal_grid(block: Block, groups: list[tuple[str, str | None]]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for title in ("", *(group_title(group) for group in groups)):
        grid.add_column(Text(title), overflow="fold", style="" if title else "bold")
    for metric, name in ROWS.items():
        grid.add_row(name, *(_terminal_cell(block, group, metric) for group in groups))
    return grid


def _terminal_cell(block: Block, group: tuple[str, str | None], metric: str) -> Text:
    cell = _terminal_piece(piece(block.columns.get(group[0]), metric))
    if group[1] is not None:
        cell.append("\n[").append_text(_terminal_piece(piece(block.columns.get(group[1]), metric))).append("]")
    return cell


def _terminal_piece(part: Piece) -> Text:
    """Return a number with its interval and the slides' figure; a sign marks the best where bold is not seen."""
    text = Text(part.value, style="bold green" if part.best else "")
    text = Text().append_text(text).append(part.flag, style="yellow").append(BEST if part.best else "")
    return text.append(part.margin, style="dim").append(f" {part.paper}" if part.paper else "", style="dim")
