"""What things are called and how they are coloured, the same in every table, figure and sentence."""

from collections.abc import Iterable
from dataclasses import dataclass

BASELINE = "none"
"""The cell without a defense: the ceiling of PSNR and SSIM, the yardstick of ACC and ART."""

MUTED_SUFFIX = "_muted"
"""An audit labelled `<defense>_muted` leaves the defended layer out of the matching; with a column of its own."""


@dataclass(frozen=True)
class Look:
    """How one column of the tables appears.

    Attributes:
        short: Name where space is scarce.
        long: Name in figures and sentences.
        colour: Hex colour, legible on white and distinct to colour-blind readers.
    """

    short: str
    long: str
    colour: str


@dataclass(frozen=True)
class Metric:
    """A measured quantity: its unit, its number of decimals and whether less of it is better."""

    unit: str
    decimals: int
    lower_is_better: bool
    signed: bool = False

    def text(self, value: float) -> str:
        """Return the value as the tables print it, without its unit."""
        return f"{value:{'+' if self.signed else ''}.{self.decimals}f}".replace("-", "−")

    def with_unit(self, value: float) -> str:
        """Return the value followed by its unit."""
        return f"{self.text(value)} {self.unit}".strip()


METRICS = {
    "PSNR": Metric("dB", 2, lower_is_better=True),
    "SSIM": Metric("", 3, lower_is_better=True),
    "ACC": Metric("%", 2, lower_is_better=False),
    "ART": Metric("%", 2, lower_is_better=True, signed=True),
}

LOOKS = {
    "none": Look("No defense", "No defense", "#4d4d4d"),
    "graddefense": Look("GradDefense", "GradDefense (“Ours” in the slides)", "#0072b2"),
    "gc": Look("GC", "Gradient compression (GC)", "#d98e00"),
    "dp_gaussian": Look("DP-G", "DP, Gaussian noise (DP-G)", "#009e73"),
    "dp_laplacian": Look("DP-L", "DP, Laplacian noise (DP-L)", "#56a7dc"),
    "pld": Look("PLD", "PLD (Soteria)", "#d55e00"),
    "pld_muted": Look("PLD-muted", "PLD, layer muted by the attacker", "#b5528f"),
}

SPARE_COLOURS = ("#7a5195", "#8c6d31", "#00838f", "#a63d57", "#5b7c2f")
"""For defenses of a user's own, in order of their names."""

SLIDE_GROUPS = (("graddefense", None), ("gc", None), ("dp_gaussian", "dp_laplacian"), ("pld", "pld_muted"))
"""The four columns of the slides' tables; the second name of a pair stands in brackets."""

TABLES = {"dga": ("A", "DGA", "dlg"), "gia": ("B", "GIA", "gia")}
"""Letter and name of each of the slides' tables, and the attack behind it."""

ATTACKS = {"dlg": "DLG", "idlg": "iDLG", "gia": "GIA"}

DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "Digits"}
"""Data sets in the order of the slides."""

GUESSES = {"noise": "clamped noise", "uniform": "uniform noise", "mean": "mean image", "grey": "mid-grey"}
"""The guesses that know nothing of the victims."""


def is_muted(label: str) -> bool:
    """Whether the label is of an attack that mutes the layer which a defense protects."""
    return label.endswith(MUTED_SUFFIX)


def look(column: str, present: Iterable[str] = ()) -> Look:
    """Return how a column appears; one that the slides lack is named by its label and given a spare colour.

    Args:
        column: A defense's label, or that of a muted attack.
        present: All columns shown together, so that unknown ones get different colours.
    """
    if column in LOOKS:
        return LOOKS[column]
    unknown = sorted({name for name in present if name not in LOOKS} | {column})
    return Look(column, column, SPARE_COLOURS[unknown.index(column) % len(SPARE_COLOURS)])


def ordered_columns(columns: Iterable[str]) -> list[str]:
    """Return columns in the slides' order, those that the slides lack behind, by name."""
    known = list(LOOKS)
    return sorted(set(columns), key=lambda name: (known.index(name) if name in LOOKS else len(known), name))


def ordered_datasets(datasets: Iterable[str]) -> list[str]:
    """Return data sets in the slides' order, others behind, by name."""
    known = list(DATASETS)
    return sorted(set(datasets), key=lambda name: (known.index(name) if name in DATASETS else len(known), name))


def dataset_title(dataset: str) -> str:
    """Return a data set's usual spelling."""
    return DATASETS.get(dataset, dataset)


def table_title(table: str) -> str:
    """Return the slides' title of one of the two tables, or a like one for a table that they lack."""
    letter, name, _ = TABLES.get(table, ("", table.upper(), table))
    return f"[{letter}] Measure on different defenses against the {name}" if letter else f"Against {name}"


def table_name(table: str) -> str:
    """Return the slides' short name of a table: that of its attack."""
    return TABLES[table][1] if table in TABLES else table.upper()


def attack_title(attack: str) -> str:
    """Return an attack's usual spelling."""
    return ATTACKS.get(attack, attack)


def column_groups(columns: Iterable[str]) -> list[tuple[str, str | None]]:
    """Return the slides' four columns, then one for each further defense, with its muted attack in brackets."""
    present = set(columns)
    rest = ordered_columns(present - set(LOOKS))
    own = [name for name in rest if not is_muted(name) or name.removesuffix(MUTED_SUFFIX) not in present]
    extra = [(name, muted if (muted := name + MUTED_SUFFIX) in present else None) for name in own]
    return [*SLIDE_GROUPS, *extra]


def group_title(group: tuple[str, str | None]) -> str:
    """Return the heading of a column: `DP-G [DP-L]` in the manner of the slides."""
    first, second = group
    if second is None:
        return look(first).short
    return f"{look(first).short} [{'muted' if is_muted(second) else look(second).short}]"


def listed(items: Iterable[str]) -> str:
    """Return `a, b and c`."""
    parts = list(items)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
