"""Boil a comparison down to the numbers that its tables, figures and sentences show."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np
import pandas as pd
import yaml

from analysis.load import Comparison
from analysis.names import BASELINE, METRICS, MUTED_SUFFIX, is_muted, ordered_columns
from analysis.statistics import Estimate, clearly_best, mean_interval, proportion_interval

RECOVERED_PSNR = 30.0
"""PSNR, in dB, above which an image counts as recovered."""

Standing = Literal["floor", "leaks", "unclear", "uncounted"]
"""What a cell shows: the attack is no better than a blind guess, in PSNR and SSIM; it is better in one of them;
the intervals cannot tell; or nothing: the attack stalled, ran out of budget or fails even without a defense."""


@dataclass(frozen=True)
class Score:
    """One number of a table.

    Attributes:
        estimate: Ours; None when the cell was not run, or has no such figure.
        paper: What the slides give, in the same unit; None when they give none.
        best: Whether it is marked as best, or as not distinguishable from the best.
    """

    estimate: Estimate | None = None
    paper: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column of a data set's block: a defense, or a muted attack on one.

    Attributes:
        name: The defense's label, or that of the muted attack.
        scores: PSNR (dB), SSIM, ACC (%), ART (% over no defense).
        images: Number of reconstructed images.
        seeds: Number of finished seeds.
        stalled: Images whose optimiser stalled, or whose reconstruction is no image.
        exhausted: Images whose budget ran out while the loss was still falling.
        capped: Images whose PSNR is the cap.
        recovered: Images above `RECOVERED_PSNR`.
        worst: Highest PSNR of any image, dB; NaN without images.
    """

    name: str
    scores: dict[str, Score]
    images: int = 0
    seeds: int = 0
    stalled: int = 0
    exhausted: int = 0
    capped: int = 0
    recovered: int = 0
    worst: float = float("nan")

    @property
    def flagged(self) -> bool:
        """Whether some of its attacks cannot be counted as protection."""
        return self.stalled + self.exhausted > 0


@dataclass(frozen=True)
class Block:
    """One data set of one table.

    Attributes:
        table: Name of the table.
        dataset: Name of the data set.
        baseline: The cell without a defense: the ceiling.
        columns: The others by name, in the slides' order; those of the slides that were not run are there too.
        floors: Best blind guess by metric (PSNR, SSIM): its name and mean score over the same images.
    """

    table: str
    dataset: str
    baseline: Column
    columns: dict[str, Column]
    floors: dict[str, tuple[str, float]] = field(default_factory=dict)

    @property
    def every(self) -> list[Column]:
        """All columns that hold a result, no defense first."""
        return [c for c in (self.baseline, *self.columns.values()) if c.seeds]

    @property
    def attack_works(self) -> bool:
        """Whether the attack beats a blind guess without a defense; taken for granted where nobody tried."""
        return self.standing(self.baseline) in ("leaks", None)

    def standing(self, column: Column) -> Standing | None:
        """Return what PSNR and SSIM of a column show; None without images or floors."""
        pairs = [(column.scores[metric].estimate, floor) for metric, (_, floor) in self.floors.items()]
        known = [(estimate, floor) for estimate, floor in pairs if estimate is not None]
        if not known:
            return None
        if column.recovered or any(estimate.low > floor for estimate, floor in known):
            return "leaks"
        if column.flagged or not (column is self.baseline or self.attack_works):
            return "uncounted"
        return "floor" if all(estimate.high <= floor for estimate, floor in known) else "unclear"


@cache
def paper_tables() -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """Return the slides' figures: table → data set → column → metric."""
    text = (resources.files("analysis") / "paper_tables.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def summarise(comparison: Comparison) -> list[Block]:
    """Return one block for each data set of each table, best cells marked."""
    return [_block(comparison, table, dataset) for table, dataset in comparison.blocks]


def blocks_of(blocks: Iterable[Block], table: str) -> list[Block]:
    """Return the blocks of one table."""
    return [block for block in blocks if block.table == table]


def _block(comparison: Comparison, table: str, dataset: str) -> Block:
    cells, images, floors = (
        comparison.part(frame, table, dataset)
        for frame in (comparison.cells, comparison.images, comparison.floors)
    )
    paper = paper_tables().get(table, {}).get(dataset, {})
    present = {*cells["defense"], *images["column"], *paper, *_slide_columns()} - {"", BASELINE}
    columns = {name: _column(name, cells, images, paper.get(name, {})) for name in ordered_columns(present)}
    block = Block(
        table=table,
        dataset=dataset,
        baseline=_column(BASELINE, cells, images, paper.get(BASELINE, {})),
        columns=columns,
        floors=_floors(floors),
    )
    return replace(block, columns=_with_best_marked(block))


def _slide_columns() -> set[str]:
    return set(paper_tables()["dga"]["mnist"])


def _column(name: str, cells: pd.DataFrame, images: pd.DataFrame, paper: dict[str, float | None]) -> Column:
    mine = images[images["column"] == name]
    runs = cells[cells["defense"] == name]
    usable = mine.dropna(subset=["PSNR", "SSIM"])
    estimates = {
        "PSNR": mean_interval(usable["PSNR"], usable["seed"]) if len(usable) else None,
        "SSIM": mean_interval(usable["SSIM"], usable["seed"]) if len(usable) else None,
        "ACC": _accuracy(runs),
        "ART": None if name == BASELINE else _overhead(runs),
    }
    return Column(
        name=name,
        scores={metric: Score(estimates[metric], paper.get(metric)) for metric in METRICS},
        images=len(mine),
        seeds=int((mine if is_muted(name) else runs)["seed"].nunique()),
        stalled=int((mine["stalled"] | mine["PSNR"].isna() | mine["SSIM"].isna()).sum()),
        exhausted=int(mine["exhausted"].sum()),
        capped=int(mine["capped"].sum()),
        recovered=int((mine["PSNR"] > RECOVERED_PSNR).sum()),
        worst=float(mine["PSNR"].max()),
    )


def _accuracy(runs: pd.DataFrame) -> Estimate | None:
    """Student's t over seeds; with one seed Wilson's interval over the test images, if their number is known."""
    if runs.empty:
        return None
    values = runs["ACC"].astype(float)
    trials = runs["test_images"].iloc[0]
    if len(values) == 1 and pd.notna(trials):
        return proportion_interval(float(values.iloc[0]), int(trials)).scaled(100)
    return mean_interval(values, runs["seed"]).scaled(100)


def _overhead(runs: pd.DataFrame) -> Estimate | None:
    """Mean of the seeds' medians over paired rounds, between the lowest and the highest quartile of any seed."""
    paired = runs.dropna(subset=["overhead"])
    if paired.empty:
        return None
    ends = paired[["overhead_low", "overhead_high"]].astype(float)
    low, high = np.nan, np.nan
    if ends.notna().all(axis=None):
        low, high = float(ends["overhead_low"].min()), float(ends["overhead_high"].max())
    return Estimate(float(paired["overhead"].mean()), low, high).scaled(100)


def _floors(floors: pd.DataFrame) -> dict[str, tuple[str, float]]:
    if floors.empty:
        return {}
    means = floors.groupby("guess")[["PSNR", "SSIM"]].mean()
    return {metric: (str(means[metric].idxmax()), float(means[metric].max())) for metric in ("PSNR", "SSIM")}


def _with_best_marked(block: Block) -> dict[str, Column]:
    """Mark what is clearly best; a defense that a muted attack undoes competes with the higher of its figures."""
    marked = dict(block.columns)
    for metric, kind in METRICS.items():
        candidates = {
            name: estimate
            for name in block.columns
            if not is_muted(name) and (estimate := _against_strongest(block, name, metric))
        }
        about_privacy = metric in ("PSNR", "SSIM")
        winners = clearly_best(
            candidates,
            barred=_barred(block) if about_privacy else frozenset(),
            lower_is_better=kind.lower_is_better,
            floor=block.floors[metric][1] if metric in block.floors else -np.inf,
        )
        for name in winners:
            scores = marked[name].scores
            marked[name] = replace(marked[name], scores={**scores, metric: replace(scores[metric], best=True)})
    return marked


def _against_strongest(block: Block, name: str, metric: str) -> Estimate | None:
    muted = block.columns.get(name + MUTED_SUFFIX)
    rivals = [block.columns[name], *([muted] if muted and metric in ("PSNR", "SSIM") else [])]
    estimates = [column.scores[metric].estimate for column in rivals]
    return max((e for e in estimates if e is not None), key=lambda e: e.value, default=None)


def _barred(block: Block) -> frozenset[str]:
    """Return the defenses whose protection does not count."""
    flagged = [name for name, column in block.columns.items() if column.flagged or not block.attack_works]
    return frozenset(name.removesuffix(MUTED_SUFFIX) for name in flagged)
