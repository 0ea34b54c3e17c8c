import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis import write
from analysis.figures import draw_all
from analysis.frames import CellKey
from analysis.grids import reconstruction_grid
from analysis.load import Comparison, load_comparison
from analysis.report import report_html
from analysis.settings import settings_groups
from analysis.summary import summarise
from tests.analysis.synthetic import Cell, Store, small_cells

PNG = b"\x89PNG\r\n\x1a\n"


class Loads(HTMLParser):
    """Collects whatever a browser would fetch, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = {"src", "srcset", "data", "poster", "background"} | ({"href"} if tag != "a" else set())
        self.fetched += [value or "" for name, value in attributes if name in named]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(store: Store, small: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write.write_all(store.uri, small, tmp_path_factory.mktemp("output"))


def test_everything_is_written(written: dict[str, Path]) -> None:
    cells = {f"configs/dga-mnist-{cell.defense}-seed0.yaml" for cell in small_cells()}
    figures = {f"figures/{name}_dga.png" for name in ("psnr", "accuracy", "overhead")} | {
        "figures/grid_dga_mnist.png"
    }
    tables = {f"table_dga.{ending}" for ending in ("md", "tex", "csv")}
    assert set(written) == cells | figures | tables | {"configs/comparison.yaml", "images.csv", "report.html"}
    assert all(path.is_file() and path.stat().st_size for path in written.values())
    assert all(written[name].read_bytes().startswith(PNG) for name in figures)


def test_the_report_loads_nothing_from_elsewhere(written: dict[str, Path]) -> None:
    page = written["report.html"].read_text()
    found = Loads(page)
    assert len(found.fetched) == 4
    assert all(address.startswith("data:image/png;base64,") for address in found.fetched)
    assert not {"script", "link", "iframe", "object", "embed"} & set(found.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_the_report_shows_numbers_and_how_to_get_them(written: dict[str, Path]) -> None:
    text = re.sub(r"\s+", " ", Loads(written["report.html"].read_text()).text)
    for expected in (
        "DLG gets no closer than a blind guess against GradDefense, DP-L and PLD on MNIST.",
        "6.00 ±2.48 slides 9.41",
        "fedsim run configs/dga-mnist-graddefense-seed0.yaml",
        "fedsim compare --preset configs/comparison.yaml",
        "torch",
        "2.11.0",
    ):
        assert expected in text


def test_what_comes_from_outside_is_escaped(store: Store) -> None:
    hostile = Cell("dga", "digits", "<script>alert(1)</script>", [9.0], config={"note": "</pre><b>x</b>"})
    store.comparison("hostile & <b>", [hostile])
    comparison = load_comparison(store.uri, "hostile & <b>")
    page = report_html(comparison, summarise(comparison), [])
    found = Loads(page)
    assert "script" not in found.tags
    assert "<b>x</b>" not in page
    assert "<script>alert(1)</script>" in found.text
    assert "hostile & <b>" in found.text
    assert "Some <CPU> & more" in found.text
    assert "<b>x</b>" in found.text


def test_a_comparison_of_one_cell_still_gives_all(store: Store, tmp_path: Path) -> None:
    store.comparison("single", [Cell("gia", "cifar10", "none", [20.0])])
    written = write.write_all(store.uri, "single", tmp_path)
    assert "table_gia.md" in written
    assert "figures/overhead_gia.png" not in written
    assert "figures/grid_gia_cifar10.png" not in written
    assert "GradDefense" in written["report.html"].read_text()


def test_a_failure_leaves_what_was_there(
    store: Store, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("former")
    (tmp_path / "mine.txt").write_text("kept")

    def fail(*_: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(write, "report_html", fail)
    with pytest.raises(OSError, match="no space"):
        write.write_all(store.uri, small, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "report.html"]
    assert (tmp_path / "report.html").read_text() == "former"


def test_grids_match_victims_by_their_originals(store: Store, tmp_path: Path) -> None:
    cells = small_cells()[:2]
    cells[1].images = cells[1].images[::-1].copy()
    cells[1].psnr = cells[1].psnr[::-1]
    store.comparison("swapped", cells)
    comparison = load_comparison(store.uri, "swapped")
    (block,) = summarise(comparison)
    figure, caption = reconstruction_grid(comparison, block)
    shown = [text.get_text() for text in figure.axes[0].texts]
    # By position the second row would read 7.0, 6.0, 5.0.
    assert [text for text in shown if text in ("5.0", "6.0", "7.0")] == ["5.0", "6.0", "7.0"]
    assert caption.startswith("DLG on MNIST")
    assert len(draw_all(comparison, [block], tmp_path)) == 4


def test_settings_are_told_by_what_they_depend_on() -> None:
    configs = {
        CellKey(table, dataset, defense, seed): (
            f"name: x\nseed: {seed}\nlr: 0.1\nattacks: [{{name: {table}}}]\n"
            f"rounds: {len(dataset)}\ndefense: {{name: {defense}}}\n"
        )
        for table in ("dga", "gia")
        for dataset in ("mnist", "cifar10")
        for defense in ("none", "gc")
        for seed in (0, 1)
    }
    groups = {group.title: dict(group.rows) for group in settings_groups(configs)}
    assert groups["all cells"] == {"all": {"lr": "0.1"}}
    assert groups["by table"] == {"DGA": {"attacks.0.name": "dga"}, "GIA": {"attacks.0.name": "gia"}}
    assert groups["by data set"] == {"MNIST": {"rounds": "5"}, "CIFAR-10": {"rounds": "7"}}
    assert groups["by defense"] == {"No defense": {"defense.name": "none"}, "GC": {"defense.name": "gc"}}
    assert len(groups) == 4


def test_the_order_of_columns_is_that_of_the_slides(comparison: Comparison) -> None:
    (block,) = summarise(comparison)
    assert list(block.columns) == ["graddefense", "gc", "dp_gaussian", "dp_laplacian", "pld", "pld_muted"]
