"""One look for all figures, and a safe way to write them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 160
INK = "#222222"
FAINT = "#8a8a8a"

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#bbbbbb",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@contextmanager
def look_and_feel() -> Iterator[None]:
    """Apply the look to the figures drawn inside, and leave matplotlib's settings as they were."""
    with matplotlib.rc_context(SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return a figure in inches that needs no display and no global state."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")
    return path


def css_width(figure: Figure) -> int:
    """Return the width at which a page shows the figure in its natural size, in CSS pixels."""
    return round(figure.get_figwidth() * 96)


def name_rows(panels: list[Axes], names: list[str], colours: list[str]) -> None:
    """Label the rows that horizontal charts share, from the top down, each in the colour of its marks."""
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for label, colour in zip(panels[0].get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
