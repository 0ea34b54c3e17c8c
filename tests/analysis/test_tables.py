import io
import re

import pandas as pd
from rich.console import Console

from analysis.latex import escape, latex
from analysis.load import Comparison, load_comparison
from analysis.summary import Block, summarise
from analysis.tables import csv, images_csv, markdown, print_tables
from tests.analysis.synthetic import Cell, Store


def printed(comparison: Comparison, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_tables(comparison, console)
    return console.file.getvalue()


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_is_laid_out_like_the_slides(block: Block) -> None:
    text = markdown([block])
    assert "## MNIST – ACC 92.00 % (91.69 %) without defenses" in text
    assert row(text, " |") == ["", "GradDefense", "GC", "DP-G [DP-L]", "PLD [muted]"]
    psnr = row(text, "PSNR")
    assert psnr[1] == "**6.00** ±2.48 (9.41)"
    assert psnr[2] == "21.00 ±2.48 (9.52)"
    assert psnr[3].startswith("4.10† ±0.25 (9.36) [**5.10** ±0.25 (9.39)]")
    assert psnr[4] == "5.50 ±1.24 (9.57) [45.00 ±4.97 (18.49)]"
    assert row(text, "ART")[1:] == [
        "+4.00 ±1.00 (+8.45)",
        "**+1.00** ±0.50 (+4.63)",
        "– (+3.91) [– (+3.74)]",
        "– (+14.52) [–]",
    ]


def test_notes_give_floor_ceiling_counts_and_flags(block: Block) -> None:
    text = markdown([block])
    assert "Ceiling (no defense): PSNR 46.00 ±4.97 (" not in text
    assert "Ceiling (no defense): PSNR 46.00 ±4.97 dB, SSIM 0.980 ±0.025; 3 of 3 images above 30 dB." in text
    assert "Floor (best blind guess): PSNR 12.00 dB (mean image), SSIM 0.200 (mean image)." in text
    assert "3 images and 1 seed a cell." in text
    assert "† Attacks that are not counted as protection: DP-G 1 stalled, 1 out of budget (of 3)." in text


def test_data_sets_without_paper_figures_show_none(store: Store) -> None:
    store.comparison("plain", [Cell("dga", "digits", "none", [40.0]), Cell("dga", "digits", "gc", [9.0, 9.5])])
    text = markdown(summarise(load_comparison(store.uri, "plain")))
    assert "## Digits – ACC 90.00 % without defenses" in text
    assert row(text, "PSNR")[1:] == ["–", "9.25 ±3.18", "– [–]", "– [–]"]


def test_the_terminal_shows_the_same_within_100_columns(comparison: Comparison) -> None:
    text = printed(comparison)
    assert max(map(len, text.splitlines())) <= 100
    assert "6.00*±2.48 (9.41)" in text
    assert "[45.00±4.97 (18.49)]" in text
    assert "4.10†±0.25 (9.36)" in text
    assert "…" not in text


def test_nothing_is_cut_off_on_a_narrow_terminal(comparison: Comparison) -> None:
    wide, narrow = (re.sub(r"[^0-9]", "", printed(comparison, width)) for width in (100, 70))
    assert sorted(narrow) == sorted(wide)


def test_a_defense_of_ones_own_gets_a_table_below(store: Store) -> None:
    mine = Cell("dga", "digits", "my_[b]old_defense", [9.0], muted=[40.0])
    store.comparison("own", [mine, Cell("dga", "digits", "gc", [9.0])])
    comparison = load_comparison(store.uri, "own")
    assert "my_[b]old_defense [muted]" in printed(comparison)
    text = markdown(summarise(comparison))
    assert row(text, " |")[-1] == "my_[b]old_defense [muted]"
    assert row(text, "PSNR")[-1] == "9.00 [40.00]"


def test_latex_escapes_all_that_tex_would_read() -> None:
    assert escape("a_b & 5% {x} #1 $ ~^\\") == (
        r"a\_b \& 5\% \{x\} \#1 \$ \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert escape("−1 ±2 [x] †") == r"$-$1 $\pm$2 {[}x{]} $\dagger$"


def test_latex_table_is_well_formed(block: Block) -> None:
    text = latex([block])
    assert text.isascii()
    assert text.count("{") == text.count("}")
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if "&" in line]
    assert len(rows) == 12
    assert {line.count("&") for line in rows} == {4}
    assert r"\textbf{6.00}" in body
    assert r"4.10$\dagger$ {[}\textbf{5.10}{]}" in body
    assert "(9.36) {[}(9.39){]}" in body
    assert re.search(r"\\multicolumn\{4\}\{c\}\{MNIST -- ACC 92.00 \\% \(91.69 \\%\)", text)


def test_csv_has_a_row_a_column(block: Block) -> None:
    frame = pd.read_csv(io.StringIO(csv([block]))).set_index("column")
    assert list(frame.index) == ["none", "graddefense", "gc", "dp_gaussian", "dp_laplacian", "pld", "pld_muted"]
    assert frame.loc["graddefense", ["PSNR", "PSNR_paper", "ART", "ART_high"]].tolist() == [6, 9.41, 4, 5]
    assert frame["PSNR_best"].sum() == 2
    assert frame.loc["dp_gaussian", "standing"] == "uncounted"
    assert frame.loc["none", "PSNR_floor"] == 12


def test_images_csv_has_a_row_an_image(comparison: Comparison) -> None:
    frame = pd.read_csv(io.StringIO(images_csv(comparison)))
    assert len(frame) == 21
    muted = frame[frame["attack"] == "pld_muted"]
    assert muted["PSNR"].tolist() == [43, 45, 47]
    assert set(muted["defense"]) == {"pld"}
