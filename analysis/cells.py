"""The text of a table's cells, headings and notes, before Markdown, LaTeX, HTML or the terminal dress them."""

from dataclasses import dataclass

from analysis.names import GUESSES, METRICS, dataset_title, look
from analysis.statistics import Estimate
from analysis.summary import Block, Column, Score

NOTHING = "–"
FLAG = "†"
ROWS = {"PSNR": "PSNR dB", "SSIM": "SSIM", "ACC": "ACC %", "ART": "ART %"}

BRACKETS = "Ours ± 95 % interval (the slides’ figure in brackets)."
MARKS = (
    "Bold: the best, and what cannot be told from it, if "
    "another is clearly worse by the intervals. A figure below the floor counts as the floor; a defense that an "
    "attacker can mute counts by the stronger attack. PSNR, SSIM and ART: lower is better; ACC: higher."
)
LEGEND = f"{BRACKETS} {MARKS}"
INTERVALS = (
    "PSNR and SSIM: Student’s t over images, and over seeds (cluster-robust) where there are several, the wider "
    "of the two. ACC: t over seeds; with one seed Wilson’s interval over the test images, which leaves out the "
    "variation of training itself. ART: overhead over no defense, median of paired rounds; ± its quartiles."
)


@dataclass(frozen=True)
class Piece:
    """One number of a cell, in parts that each rendering dresses its own way.

    Attributes:
        value: Our figure, or a dash.
        flag: The marker of an attack that cannot be counted, or nothing.
        margin: `±` and the half-width of the interval, or nothing.
        paper: The slides' figure in brackets, or nothing.
        best: Whether it is marked as best.
    """

    value: str
    flag: str = ""
    margin: str = ""
    paper: str = ""
    best: bool = False

    @property
    def plain(self) -> str:
        """The piece as bare text."""
        return " ".join(part for part in (self.value + self.flag, self.margin, self.paper) if part)


def piece(column: Column | None, metric: str) -> Piece:
    """Return the cell of a column in the row of a metric; a dash where there is nothing."""
    score = column.scores[metric] if column else Score()
    kind = METRICS[metric]
    paper = "" if score.paper is None else f"({kind.text(score.paper)})"
    if column is None or score.estimate is None:
        return Piece(NOTHING, paper=paper)
    flag = FLAG if column.flagged and metric in ("PSNR", "SSIM") else ""
    return Piece(kind.text(score.estimate.value), flag, margin(score.estimate, metric), paper, score.best)


def margin(estimate: Estimate, metric: str) -> str:
    """Return `±0.21`, the larger side of the interval; nothing where the spread is unknown."""
    return f"±{estimate.margin:.{METRICS[metric].decimals}f}" if estimate.has_interval else ""


def heading(block: Block) -> str:
    """Return the slides' heading of a data set, with their accuracy beside ours."""
    accuracy = block.baseline.scores["ACC"]
    ours = NOTHING if accuracy.estimate is None else f"{METRICS['ACC'].text(accuracy.estimate.value)} %"
    paper = "" if accuracy.paper is None else f" ({METRICS['ACC'].text(accuracy.paper)} %)"
    return f"{dataset_title(block.dataset)} – ACC {ours}{paper} without defenses"


def notes(block: Block) -> list[str]:
    """Return what a reader needs beside the numbers: ceiling, floor, counts, and what cannot be counted."""
    lines = [_ceiling(block), _floor(block), _counts(block), _failing(block), _flags(block), _capped(block)]
    return [line for line in lines if line]


def _ceiling(block: Block) -> str:
    if not block.baseline.images:
        return "Ceiling (no defense): not run."
    parts = [f"{m} {piece(block.baseline, m).plain} {METRICS[m].unit}".strip() for m in ("PSNR", "SSIM")]
    recovered = f"{block.baseline.recovered} of {block.baseline.images} images above 30 dB"
    return f"Ceiling (no defense): {', '.join(parts)}; {recovered}."


def _floor(block: Block) -> str:
    if not block.floors:
        return "Floor: not measured."
    parts = [
        f"{metric} {METRICS[metric].with_unit(value)} ({GUESSES.get(guess, guess)})"
        for metric, (guess, value) in block.floors.items()
    ]
    return f"Floor (best blind guess): {', '.join(parts)}."


def _counts(block: Block) -> str:
    images = _span(sorted({column.images for column in block.every if column.images}))
    seeds = _span(sorted({column.seeds for column in block.every}))
    return f"{images or 'No'} images and {seeds} seed{'' if seeds == '1' else 's'} a cell."


def _span(counts: list[int]) -> str:
    if not counts:
        return ""
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"


def _failing(block: Block) -> str:
    if block.attack_works:
        return ""
    return (
        f"{FLAG} Even without a defense the attack is not shown to beat a blind guess: no column shows protection."
    )


def _flags(block: Block) -> str:
    flagged = [f"{look(c.name).short} {flag_counts(c)}" for c in block.every if c.flagged]
    return f"{FLAG} Attacks that are not counted as protection: {'; '.join(flagged)}." if flagged else ""


def flag_counts(column: Column) -> str:
    """Return `3 stalled, 2 out of budget (of 8)`."""
    counts = ((column.stalled, "stalled"), (column.exhausted, "out of budget"))
    return f"{', '.join(f'{n} {what}' for n, what in counts if n)} (of {column.images})"


def _capped(block: Block) -> str:
    capped = [f"{look(c.name).short} {c.capped} of {c.images}" for c in block.every if c.capped]
    return f"PSNR capped at 100 dB: {'; '.join(capped)}." if capped else ""
