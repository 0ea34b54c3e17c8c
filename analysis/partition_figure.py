"""The picture of a partition: which classes each client holds, and how many images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

MOST_BARS = 40
"""With more clients than this, bars would be too thin to read, and a heat map takes their place."""

MOST_COLUMNS = 400
"""With more clients than this, neighbours share a column of the heat map and are averaged."""

INK, QUIET = "#222222", "#777777"


def draw_partition(counts: NDArray[np.int64], class_names: Sequence[str], path: Path) -> None:
    """Draw class counts a client, as stacked bars or a heat map, beside a histogram of client sizes.

    Args:
        counts: Images of each class that each client holds, [clients, classes].
        class_names: One name a class.
        path: Where to write it; the suffix chooses the format. Folders are made.

    Raises:
        ValueError: If `counts` is not a matrix with a column a class and at least one client.
    """
    if counts.ndim != 2 or counts.shape[0] == 0 or counts.shape[1] != len(class_names):
        raise ValueError(f"counts of shape {counts.shape} do not fit {len(class_names)} class names")
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    main, side = figure.subplots(1, 2, width_ratios=(3.4, 1))
    (_draw_bars if len(counts) <= MOST_BARS else _draw_heat_map)(main, counts, class_names)
    _draw_sizes(side, counts.sum(axis=1))
    figure.suptitle(_summary(counts), x=0.01, ha="left", fontsize=11, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _summary(counts: NDArray[np.int64]) -> str:
    sizes, held = counts.sum(axis=1), (counts > 0).sum(axis=1)
    clients = f"{len(sizes):,} client{'s' if len(sizes) > 1 else ''}"
    return (
        f"{sizes.sum():,} images, {clients}    "
        f"a client: {_range(sizes)} images of {_range(held)} of {counts.shape[1]} classes"
    )


def _range(values: NDArray[np.int64]) -> str:
    low, high = values.min(), values.max()
    return f"{low:,}" if low == high else f"{low:,}–{high:,} (median {np.median(values):,.0f})"


def _draw_bars(axes: Axes, counts: NDArray[np.int64], class_names: Sequence[str]) -> None:
    positions, bottom = np.arange(len(counts)), np.zeros(len(counts))
    colours = _colours(len(class_names))
    for column, name in enumerate(class_names):
        heights = counts[:, column]
        axes.bar(positions, heights, 0.86, bottom, color=colours[column], label=name)
        bottom += heights
    axes.set(xlabel="client", ylabel="images", xlim=(-0.6, len(counts) - 0.4))
    axes.margins(y=0.04)
    _plain(axes, ticks=10)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        names[::-1],
        loc="upper left",
        bbox_to_anchor=(1, 1),
        ncols=-(-len(names) // 20),
        frameon=False,
        fontsize=8,
        handlelength=1,
        handleheight=1,
    )


def _draw_heat_map(axes: Axes, counts: NDArray[np.int64], class_names: Sequence[str]) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
    # The scale reaches well above an even share, or chance would look like structure in an IID partition.
    top = max(shares.max(), min(1.0, 5 / len(class_names)))
    step = -(-len(order) // MOST_COLUMNS)
    groups = [shares[order[start : start + step]] for start in range(0, len(order), step)]
    cells = np.stack([group.mean(axis=0) for group in groups], axis=1)
    extent = (-0.5, len(groups) * step - 0.5, len(class_names) - 0.5, -0.5)
    image = axes.imshow(
        cells, aspect="auto", cmap="Blues", vmin=0, vmax=top, interpolation="nearest", extent=extent
    )
    axes.set(xlabel="clients, ordered by their largest class", xlim=(-0.5, len(counts) - 0.5))
    if len(class_names) <= 30:
        axes.set_yticks(range(len(class_names)), class_names)
    else:
        axes.set_ylabel("class")
    axes.xaxis.set_major_locator(_locator(8))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, format=PercentFormatter(1, decimals=0))
    bar.set_label("share of a client's images", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _draw_sizes(axes: Axes, sizes: NDArray[np.int64]) -> None:
    low, high = int(sizes.min()), int(sizes.max())
    step = max(1, -(-(high - low + 1) // 24))
    edges = np.arange(low, high + step + 1, step) - 0.5
    axes.hist(sizes, edges.tolist(), color="#4c72b0", rwidth=0.92)
    axes.axvline(sizes.mean(), color=INK, linewidth=1, linestyle=":")
    axes.set_title(f"mean {sizes.mean():,.1f}", fontsize=8, color=QUIET)
    axes.set(xlabel="images of a client", ylabel="clients")
    if high - low < 5:
        axes.set_xlim(low - 2.5, high + 2.5)
    _plain(axes, ticks=4)


def _plain(axes: Axes, ticks: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color=QUIET)
    axes.xaxis.set_major_locator(_locator(ticks))
    axes.yaxis.set_major_locator(_locator(8))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)


def _locator(ticks: int) -> MaxNLocator:
    return MaxNLocator(ticks, integer=True, steps=(1, 2, 5, 10), min_n_ticks=1)


def _colours(classes: int) -> list[tuple[float, float, float, float]]:
    if classes <= 20:
        return [colormaps["tab10" if classes <= 10 else "tab20"](index) for index in range(classes)]
    return [colormaps["turbo"](index / (classes - 1)) for index in range(classes)]
