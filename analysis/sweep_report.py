"""Everything that a sweep's readers need, in one folder: tables, figures and one page."""

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis.ablation import FEWEST_TRIALS, Importance, figures_of, importances
from analysis.adversaries import ADVERSARIES
from analysis.frontier import ALLOWED_LOSS, Equal, Point, equals, floors_of, points
from analysis.frontier_figures import draw_ablation, draw_frontier, draw_importance
from analysis.names import dataset_title, look
from analysis.report import data_uri
from analysis.style import css_width, look_and_feel, save
from analysis.sweeps import SweepResults, load_sweep
from analysis.write import publish


def write_sweep(tracking_uri: str, name: str | None, root: Path) -> tuple[SweepResults, dict[str, Path]]:
    """Write what a sweep shows into its folder below `root`.

    Returns:
        The sweep, and the files by their path in the folder.

    Raises:
        ConfigError: If the store cannot be read or holds no such sweep.
    """
    sweep = load_sweep(tracking_uri, name)
    output = root / sweep.name
    output.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".analysis-", dir=output))
    try:
        _write(sweep, draft)
        return sweep, publish(draft, output)
    finally:
        shutil.rmtree(draft)


def _write(sweep: SweepResults, folder: Path) -> None:
    found = points(sweep)
    held = equals(found, floors_of(sweep))
    seen = set(sweep.images["adversary"]) if len(sweep.images) else set()
    adversary = max(seen & set(ADVERSARIES), key=ADVERSARIES.index, default="naive")
    figures = figures_of(sweep, adversary)
    metrics = [name for name in ("ACC", "PSNR", "SSIM", "ART", "ART_overhead") if name in figures]
    metrics = [name for name in metrics if figures[name].notna().any()]
    weights = importances(figures, sweep.varied, metrics)
    frames = {"frontier": frontier_frame(found), "equal": equal_frame(held), "importance": _frame(weights)}
    for stem, frame in frames.items():
        if len(frame):
            (folder / f"{stem}.csv").write_text(frame.to_csv(index=False), encoding="utf-8")
            (folder / f"{stem}.tex").write_text(
                frame.to_latex(index=False, float_format="%.4g", escape=True), encoding="utf-8"
            )
    sweep.images.to_csv(folder / "images.csv", index=False)
    with look_and_feel():
        pictures = _draw(sweep, found, figures, metrics, weights, folder / "figures")
    (folder / "report.html").write_text(_page(sweep, found, held, weights, pictures, adversary), encoding="utf-8")


def _draw(
    sweep: SweepResults,
    found: Sequence[Point],
    figures: pd.DataFrame,
    metrics: Sequence[str],
    weights: Sequence[Importance],
    folder: Path,
) -> dict[str, tuple[Path, int]]:
    drawn: dict[str, Figure | None] = {
        "frontier": draw_frontier(sweep, found, "PSNR") if found else None,
        "frontier_ssim": draw_frontier(sweep, found, "SSIM") if found else None,
        "ablation": draw_ablation(sweep, figures, metrics),
        "importance": draw_importance(weights),
    }
    return {
        name: (save(figure, folder / f"{name}.png"), css_width(figure))
        for name, figure in drawn.items()
        if figure is not None
    }


def frontier_frame(found: Sequence[Point]) -> pd.DataFrame:
    """Return one row a point of the frontier, with the ends of its intervals."""
    rows = []
    for point in found:
        row: dict[str, Any] = {}
        for field in dataclasses.fields(point):
            value = getattr(point, field.name)
            if field.name in ("ACC", "PSNR", "SSIM"):
                row |= {field.name: value.value, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
            else:
                row[field.name] = value
        rows.append(row)
    return pd.DataFrame(rows)


def equal_frame(held: Sequence[Equal]) -> pd.DataFrame:
    """Return one row a defense, adversary and bar, with the settings that were interpolated between."""
    rows = [dataclasses.asdict(one) for one in held]
    for row in rows:
        row["between"] = "not reached" if row["between"] is None else " … ".join(row["between"])
    return pd.DataFrame(rows)


def _frame(weights: Sequence[Importance]) -> pd.DataFrame:
    return pd.DataFrame([dataclasses.asdict(one) for one in weights])


def _page(
    sweep: SweepResults,
    found: Sequence[Point],
    held: Sequence[Equal],
    weights: Sequence[Importance],
    pictures: dict[str, tuple[Path, int]],
    adversary: str,
) -> str:
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "dataset_title": dataset_title}
    return environment.get_template("sweep.html.j2").render(
        sweep=sweep,
        points=found,
        equals=held,
        weights=weights,
        pictures=pictures,
        adversary=adversary,
        floors=floors_of(sweep),
        look=look,
        allowed_loss=ALLOWED_LOSS,
        fewest=FEWEST_TRIALS,
    )
