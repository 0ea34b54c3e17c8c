"""What the numbers say, in plain sentences; every one of them follows from the data at hand."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from analysis.contrast import Difference, differences, reversals
from analysis.load import Comparison
from analysis.names import METRICS, MUTED_SUFFIX, TABLES, attack_title, dataset_title, is_muted, listed, look
from analysis.summary import RECOVERED_PSNR, Block, Column, Standing, blocks_of

Kind = Literal["scope", "ceiling", "protection", "leak", "caution", "cost", "paper"]

ENOUGH_RECOVERED = 0.5
"""Below this share of recovered images without a defense, an attack is called weak."""


@dataclass(frozen=True)
class Finding:
    """One sentence of the summary.

    Attributes:
        kind: What sort of news it is.
        text: The sentence.
        about: Heading that it stands under: an attack, or empty for the whole comparison.
    """

    kind: Kind
    text: str
    about: str = ""


def findings(comparison: Comparison, blocks: list[Block]) -> list[Finding]:
    """Return the summary of a comparison, most important first."""
    found = _scope(comparison)
    for table in dict.fromkeys(block.table for block in blocks):
        mine = blocks_of(blocks, table)
        heading = f"Attacked by {attack_of(mine[0])}"
        found += [replace(one, about=heading) for one in _ceiling(mine) + _standings(mine) + _muted(mine)]
    return found + _costs(blocks) + _paper(blocks)


def _scope(comparison: Comparison) -> list[Finding]:
    cells, images = comparison.cells, comparison.images
    datasets = listed(dataset_title(name) for name in dict.fromkeys(d for _, d in comparison.blocks))
    seeds = cells["seed"].nunique()
    text = (
        f"{len(cells)} cells on {datasets}, {seeds} seed{'s' if seeds > 1 else ''}; "
        f"{len(images)} reconstructed images."
    )
    found = [Finding("scope", text)]
    if comparison.missing:
        found.append(Finding("caution", f"{_count(len(comparison.missing), 'planned cell')} not finished."))
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what} is" if number == 1 else f"{number} {what}s are"


def attack_of(block: Block) -> str:
    """Return the name of the attack behind a block's table."""
    return attack_title(TABLES[block.table][2]) if block.table in TABLES else block.table


def _ceiling(blocks: list[Block]) -> list[Finding]:
    shown = [block for block in blocks if block.baseline.images]
    if not shown:
        text = f"{attack_of(blocks[0])} was not tried without a defense: nothing shows its power."
        return [Finding("caution", text)]
    shares = listed(
        f"{b.baseline.recovered} of {b.baseline.images} {dataset_title(b.dataset)} images "
        f"({_mean(b.baseline, 'PSNR')} on average)"
        for b in shown
    )
    text = f"Without a defense {attack_of(blocks[0])} recovers {shares} above {RECOVERED_PSNR:.0f} dB."
    return [Finding("ceiling", text), *_weakness(shown)]


def _weakness(blocks: list[Block]) -> list[Finding]:
    """Return where the attack is too weak, by itself, to test a defense by."""
    attack = attack_of(blocks[0])
    blind = [b for b in blocks if not b.attack_works]
    weak = [b for b in blocks if b not in blind and b.baseline.recovered < ENOUGH_RECOVERED * b.baseline.images]
    found = []
    if blind:
        text = (
            f"On {_named(blind)} {attack} is not shown to beat a blind guess even without a defense: "
            "nothing in the defended columns is evidence of protection there."
        )
        found.append(Finding("caution", text))
    if weak:
        text = (
            f"On {_named(weak)} {attack} recovers less than half of the images even without a defense: "
            "what holds it off there may not hold off a stronger attack."
        )
        found.append(Finding("caution", text))
    return found


def _named(blocks: list[Block]) -> str:
    return listed(dataset_title(block.dataset) for block in blocks)


def _mean(column: Column, metric: str) -> str:
    estimate = column.scores[metric].estimate
    return "–" if estimate is None else METRICS[metric].with_unit(estimate.value)


def _standings(blocks: list[Block]) -> list[Finding]:
    """Return which defenses hold the attack at the floor, which leak, and which show nothing."""
    attack = attack_of(blocks[0])
    sentences: list[tuple[Kind, Standing, str, bool]] = [
        ("protection", "floor", f"{attack} gets no closer than a blind guess against", False),
        ("leak", "leaks", f"{attack} sees more than a blind guess through", True),
        ("caution", "unclear", f"The intervals do not tell {attack} from a blind guess against", True),
        ("caution", "uncounted", f"{attack} stalled or ran out of budget, so nothing is shown, against", False),
    ]
    return [
        Finding(kind, f"{start} {where}.")
        for kind, standing, start, detailed in sentences
        if (where := _where(blocks, standing, detailed))
    ]


def _where(blocks: list[Block], standing: Standing, detailed: bool) -> str:
    """Return `A and B on every data set, C on MNIST`, or with figures, for the columns of that standing."""
    everywhere, somewhere = [], []
    for name in dict.fromkeys(name for block in blocks for name in block.columns if not is_muted(name)):
        tried = [block for block in blocks if name in block.columns and block.standing(block.columns[name])]
        hits = [block for block in tried if block.standing(block.columns[name]) == standing]
        if standing == "uncounted":
            hits = [block for block in hits if block.columns[name].flagged]
        if hits and detailed:
            details = ", ".join(_detail(block, block.columns[name]) for block in hits)
            somewhere.append(f"{look(name).short} ({details})")
        elif hits and len(hits) == len(blocks):
            everywhere.append(look(name).short)
        elif hits:
            somewhere.append(f"{look(name).short} on {_named(hits)}")
    scope = "every data set" if len(blocks) > 1 else dataset_title(blocks[0].dataset)
    whole = f"{listed(everywhere)} on {scope}" if everywhere else ""
    return "; ".join(part for part in (whole, listed(somewhere)) if part)


def _detail(block: Block, column: Column) -> str:
    figures = ", ".join(f"{metric} {_mean(column, metric)}" for metric in ("PSNR", "SSIM"))
    recovered = f", {column.recovered} of {column.images} recovered" if column.recovered else ""
    return f"{dataset_title(block.dataset)}: {figures}{recovered}"


def _muted(blocks: list[Block]) -> list[Finding]:
    found = []
    for name in dict.fromkeys(n for block in blocks for n in block.columns if is_muted(n)):
        naive = name.removesuffix(MUTED_SUFFIX)
        tried = [block for block in blocks if name in block.columns and block.columns[name].images]
        pairs = [(block, block.columns[naive], block.columns[name]) for block in tried]
        undone = [trio for trio in pairs if _clearly_above(trio[2], trio[1])]
        level = [trio for trio in pairs if trio not in undone]
        title = look(naive).short
        if undone:
            text = f"Leaving the layer that {title} defends out of the matching undoes it: PSNR rises from"
            found.append(Finding("leak", f"{text} {listed(_rise(*trio) for trio in undone)}."))
        if level:
            text = (
                f"Leaving the layer that {title} defends out of the matching does not clearly help: PSNR goes from"
            )
            found.append(Finding("protection", f"{text} {listed(_rise(*trio) for trio in level)}."))
    return found


def _clearly_above(one: Column, other: Column) -> bool:
    high, low = one.scores["PSNR"].estimate, other.scores["PSNR"].estimate
    return high is not None and low is not None and high.low > low.high


def _rise(block: Block, naive: Column, muted: Column) -> str:
    return f"{_mean(naive, 'PSNR')} to {_mean(muted, 'PSNR')} on {dataset_title(block.dataset)}"


def _costs(blocks: list[Block]) -> list[Finding]:
    names = dict.fromkeys(name for block in blocks for name in block.columns if not is_muted(name))
    costs = [(name, _accuracy_cost(blocks, name), _time_cost(blocks, name)) for name in names]
    parts = [f"{look(name).short} {listed(filter(None, pair))}" for name, *pair in costs if any(pair)]
    text = f"Against training without a defense: {'; '.join(parts)}."
    return [Finding("cost", text, "What it costs")] if parts else []


def _accuracy_cost(blocks: list[Block], name: str) -> str:
    changes = [
        own.value - base.value
        for block in blocks
        if name in block.columns
        and (own := block.columns[name].scores["ACC"].estimate)
        and (base := block.baseline.scores["ACC"].estimate)
    ]
    return f"{_range(changes, '+.1f')} points of ACC" if changes else ""


def _time_cost(blocks: list[Block], name: str) -> str:
    estimates = [b.columns[name].scores["ART"].estimate for b in blocks if name in b.columns]
    values = [estimate.value for estimate in estimates if estimate]
    return f"{_range(values, '+.1f')} % of round time" if values else ""


def _range(values: Collection[float], form: str) -> str:
    low, high = (f"{end:{form}}".replace("-", "−") for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _paper(blocks: list[Block]) -> list[Finding]:
    pairs = differences(blocks)
    if not pairs:
        return []
    apart = [pair for pair in pairs if pair.material]
    text = f"Of {len(pairs)} figures that the slides give as well, {len(apart)} differ materially from ours"
    by_metric = [_most_apart(metric, pairs) for metric in METRICS if any(p.metric == metric for p in apart)]
    sentences = [f"{text}{': ' if apart else ''}{'; '.join(by_metric)}.", *reversals(blocks)]
    return [Finding("paper", sentence, "Against the slides") for sentence in sentences]


def _most_apart(metric: str, pairs: list[Difference]) -> str:
    mine = [pair for pair in pairs if pair.metric == metric]
    apart = [pair for pair in mine if pair.material]
    return f"{metric} {len(apart)} of {len(mine)} (most: {max(apart, key=lambda pair: pair.size)})"
