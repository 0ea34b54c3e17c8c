"""Write everything that a comparison's readers need into one folder."""

import shutil
import tempfile
from pathlib import Path

from analysis import adversaries, tables
from analysis.figures import draw_all
from analysis.latex import latex
from analysis.load import Comparison, load_comparison
from analysis.report import report_html
from analysis.summary import blocks_of, summarise

RENDERINGS = {"md": tables.markdown, "tex": latex, "csv": tables.csv}


def write_all(tracking_uri: str, name: str | None, output: Path) -> dict[str, Path]:
    """Write tables, figures, the row-an-image CSV, the cells' configurations and the report.

    All is made in a folder of its own first and then moved, file by file, so that a failure leaves what was there.

    Args:
        tracking_uri: MLflow's store.
        name: The comparison's name (its newest run), or the id of its parent run; None: the newest of all.
        output: Folder to write to; made if it is not there, other files in it are left alone.

    Returns:
        The files by their path below `output`.

    Raises:
        ConfigError: If the store cannot be read or holds no such comparison.
    """
    comparison = load_comparison(tracking_uri, name)
    output.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".analysis-", dir=output))
    try:
        _write(comparison, draft)
        return publish(draft, output)
    finally:
        shutil.rmtree(draft)


def _write(comparison: Comparison, folder: Path) -> None:
    blocks = summarise(comparison)
    for table in dict.fromkeys(block.table for block in blocks):
        for ending, render in RENDERINGS.items():
            _save(folder / f"table_{table}.{ending}", render(blocks_of(blocks, table)))
    _save(folder / "images.csv", tables.images_csv(comparison))
    rows = adversaries.summarise(comparison)
    if rows:
        _save(folder / "adversaries.md", adversaries.markdown(rows))
        _save(folder / "adversaries.csv", adversaries.csv(adversaries.every(comparison)))
    _save(folder / "configs" / "comparison.yaml", comparison.config)
    for key, config in comparison.configs.items():
        _save(folder / "configs" / f"{key}.yaml", config)
    pictures = draw_all(comparison, blocks, folder / "figures")
    _save(folder / "report.html", report_html(comparison, blocks, pictures))


def _save(path: Path, text: str) -> None:
    if text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def publish(draft: Path, output: Path) -> dict[str, Path]:
    """Move the files of `draft` to the same places below `output`; return them by their path there."""
    written = {}
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        target = output / path.relative_to(draft)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        written[str(path.relative_to(draft))] = target
    return written
