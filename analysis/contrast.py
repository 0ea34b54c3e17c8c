"""Where our figures and the slides' part."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from analysis.names import METRICS, dataset_title, is_muted, listed, look, table_name
from analysis.statistics import Estimate
from analysis.summary import Block

MATERIAL = {"PSNR": 3.0, "SSIM": 0.1, "ACC": 5.0, "ART": 5.0}
"""Smallest difference worth a word: dB, SSIM, points, points. Below it, any two implementations may differ."""

PROPOSED = "graddefense"
"""The method that the slides propose; their claims of rank are about it."""


@dataclass(frozen=True)
class Difference:
    """One figure of ours beside the slides'.

    Attributes:
        table: Name of the table.
        dataset: Name of the data set.
        column: Name of the column; no defense included.
        metric: Name of the metric.
        ours: Our estimate.
        paper: The slides' figure.
        floor: What a blind guess reaches; figures below it count as it.
    """

    table: str
    dataset: str
    column: str
    metric: str
    ours: Estimate
    paper: float
    floor: float = -math.inf

    @property
    def size(self) -> float:
        """The difference in units of what is worth a word; none between two figures below the floor."""
        ours, paper = max(self.ours.value, self.floor), max(self.paper, self.floor)
        return abs(ours - paper) / MATERIAL[self.metric]

    @property
    def material(self) -> bool:
        """Whether it is worth a word, and the slides' figure lies outside our interval (if we have one)."""
        inside = self.ours.has_interval and self.ours.low <= self.paper <= self.ours.high
        return self.size >= 1 and not inside

    def __str__(self) -> str:
        """Return `DP-G on MNIST (DGA), 86.00 % against 10.37 % in the slides`."""
        kind = METRICS[self.metric]
        where = f"{look(self.column).short} on {dataset_title(self.dataset)} ({table_name(self.table)})"
        return f"{where}, {kind.with_unit(self.ours.value)} against {kind.with_unit(self.paper)} in the slides"


def differences(blocks: Iterable[Block]) -> list[Difference]:
    """Return every figure that both we and the slides have, in the order of the tables."""
    return [
        Difference(
            block.table,
            block.dataset,
            column.name,
            metric,
            score.estimate,
            score.paper,
            block.floors[metric][1] if metric in block.floors else -math.inf,
        )
        for block in blocks
        for column in block.every
        for metric, score in column.scores.items()
        if score.estimate is not None and score.paper is not None
    ]


def reversals(blocks: list[Block]) -> list[str]:
    """Return one sentence for each rank of the proposed defense, in ACC or ART, that our intervals turn round.

    Ranks in PSNR and SSIM are left out: below the floor they mean nothing.
    """
    sentences = []
    for metric, verb in (("ACC", "more accurate than"), ("ART", "faster than")):
        for rival in dict.fromkeys(name for block in blocks for name in block.columns):
            hits = [block for block in blocks if rival in block.columns and _reversed(block, rival, metric)]
            for ahead in (True, False):
                mine = [block for block in hits if _paper_ahead(block, rival, metric) is ahead]
                if mine:
                    first, second = (PROPOSED, rival) if ahead else (rival, PROPOSED)
                    sentences.append(
                        f"In the slides {look(first).short} is {verb} {look(second).short}; "
                        f"here it is the other way round: {_evidence(mine, rival, metric)}."
                    )
    return sentences


def _reversed(block: Block, rival: str, metric: str) -> bool:
    ahead = _paper_ahead(block, rival, metric)
    ours = [block.columns[name].scores[metric].estimate for name in (PROPOSED, rival)]
    if ahead is None or None in ours or is_muted(rival):
        return False
    own, other = (estimate for estimate in ours if estimate is not None)
    if not (own.has_interval and other.has_interval):
        return False
    lower, higher = (own, other) if ahead != METRICS[metric].lower_is_better else (other, own)
    return lower.high < higher.low


def _paper_ahead(block: Block, rival: str, metric: str) -> bool | None:
    """Whether the slides rank the proposed defense before its rival; None if they do not say."""
    own, other = (block.columns[name].scores[metric].paper for name in (PROPOSED, rival))
    if own is None or other is None or own == other:
        return None
    return (own < other) == METRICS[metric].lower_is_better


def _evidence(blocks: list[Block], rival: str, metric: str) -> str:
    return listed(
        f"{dataset_title(block.dataset)} ({table_name(block.table)}) "
        + " against ".join(_value(block, name, metric) for name in (PROPOSED, rival))
        for block in blocks
    )


def _value(block: Block, name: str, metric: str) -> str:
    estimate = block.columns[name].scores[metric].estimate
    return f"{look(name).short} {METRICS[metric].with_unit(estimate.value) if estimate else '–'}"
