"""The slides' tables as LaTeX: data sets side by side, ours above its interval."""

from collections.abc import Callable

from analysis.cells import LEGEND, ROWS, Piece, heading, notes, piece
from analysis.names import column_groups, dataset_title, group_title, table_title
from analysis.summary import Block

ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "†": r"$\dagger$",
    "’": "'",
    "“": "``",
    "”": "''",
    "[": "{[}",
    "]": "{]}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
"""Brackets too: one at the start of a row would be read as an option of the row before."""

Group = tuple[str, str | None]


def escape(text: str) -> str:
    """Return text that LaTeX prints as it stands."""
    return "".join(ESCAPES.get(character, character) for character in text)


def latex_table(table: str, blocks: list[Block]) -> str:
    """Return a `table*` (packages booktabs and graphicx) with the blocks side by side."""
    groups = [(block, group) for block in blocks for group in column_groups(block.columns)]
    body = [line for metric, title in ROWS.items() for line in _metric_rows(metric, title, groups)]
    lines = [
        "% Needs \\usepackage{booktabs,graphicx}.",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{escape(table_title(table))}. {escape(LEGEND)}}}",
        rf"\label{{tab:{table.replace('_', '-')}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{''.join('c' * len(column_groups(block.columns)) for block in blocks)}}}",
        r"\toprule",
        _row(["", *(_spanning(block) for block in blocks)]),
        _rules(blocks),
        _row(["", *(escape(group_title(group)) for _, group in groups)]),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *_notes(blocks),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _spanning(block: Block) -> str:
    return rf"\multicolumn{{{len(column_groups(block.columns))}}}{{c}}{{{escape(heading(block))}}}"


def _rules(blocks: list[Block]) -> str:
    rules, start = [], 2
    for block in blocks:
        end = start + len(column_groups(block.columns)) - 1
        rules.append(rf"\cmidrule(lr){{{start}-{end}}}")
        start = end + 1
    return " ".join(rules)


def _metric_rows(metric: str, title: str, groups: list[tuple[Block, Group]]) -> list[str]:
    values = _row([escape(title), *(_cell(block, group, metric, _value) for block, group in groups)])
    margins = _row(["", *(_cell(block, group, metric, _margin) for block, group in groups)])
    return [values, margins + "[2pt]"]


def _cell(block: Block, group: Group, metric: str, dress: Callable[[Piece], str]) -> str:
    parts = [dress(piece(block.columns.get(name), metric)) for name in group if name]
    return parts[0] if len(parts) == 1 or not parts[1] else f"{parts[0]} {{[}}{parts[1]}{{]}}"


def _value(part: Piece) -> str:
    value = escape(part.value)
    value = rf"\textbf{{{value}}}" if part.best else value
    return " ".join(text for text in (value + escape(part.flag), escape(part.paper)) if text)


def _margin(part: Piece) -> str:
    return rf"{{\scriptsize {escape(part.margin)}}}" if part.margin else ""


def _notes(blocks: list[Block]) -> list[str]:
    lines = [r"\par\smallskip\footnotesize\raggedright"]
    for block in blocks:
        lines.append(rf"\textbf{{{escape(dataset_title(block.dataset))}.}} {escape(' '.join(notes(block)))}\par")
    return lines
