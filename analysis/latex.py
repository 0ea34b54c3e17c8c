"""The slides' tables as LaTeX: data sets side by side, ours above its interval."""

from collections.abc import Callable

from analysis.cells import MARKS, ROWS, Piece, heading, notes, piece
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


def latex(blocks: list[Block]) -> str:
    """Return one table as a `table*` (packages booktabs and graphicx), data sets side by side as in the slides."""
    table = blocks[0].table
    groups = [(block, group) for block in blocks for group in column_groups(block.columns)]
    body = [line for metric, title in ROWS.items() for line in _metric_rows(metric, title, groups)]
    lines = [
        "% Needs \\usepackage{booktabs,graphicx}.",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{escape(table_title(table))}. {escape(MARKS)}}}",
        rf"\label{{tab:{table.replace('_', '-')}}}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
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
    """Return our figures, and below them in small print their intervals and the slides' figures (if any)."""
    values, margins, papers = (
        [_cell(block, group, metric, dress) for block, group in groups] for dress in DRESSES
    )
    spread = "quartiles" if metric == "ART" else r"95\,\% interval"
    lines = [_row([escape(title), *values]), _row([_small(spread), *map(_small, margins)])]
    if any(papers):
        lines.append(_row([_small("slides"), *map(_small, papers)]))
    return [*lines[:-1], lines[-1] + "[3pt]"]


def _cell(block: Block, group: Group, metric: str, dress: Callable[[Piece], str]) -> str:
    parts = [dress(piece(block.columns.get(name), metric)) for name in group if name]
    return parts[0] if len(parts) == 1 or not parts[1] else f"{parts[0]} {{[}}{parts[1]}{{]}}"


def _value(part: Piece) -> str:
    value = escape(part.value)
    return (rf"\textbf{{{value}}}" if part.best else value) + escape(part.flag)


DRESSES = (_value, lambda part: escape(part.margin), lambda part: escape(part.paper))
"""Our figure, its interval and the slides' figure."""


def _small(text: str) -> str:
    return rf"{{\scriptsize {text}}}" if text else ""


def _notes(blocks: list[Block]) -> list[str]:
    lines = [r"\par\smallskip\footnotesize\raggedright"]
    for block in blocks:
        lines.append(rf"\textbf{{{escape(dataset_title(block.dataset))}.}} {escape(' '.join(notes(block)))}\par")
    return lines
