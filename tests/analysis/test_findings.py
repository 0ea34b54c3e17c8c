import pytest

from analysis.contrast import differences, reversals
from analysis.findings import findings
from analysis.load import Comparison, load_comparison
from analysis.summary import Block, summarise
from tests.analysis.synthetic import Cell, Store, small_cells


def told(comparison: Comparison) -> str:
    return "\n".join(f"{one.kind}: {one.text}" for one in findings(comparison, summarise(comparison)))


def changed(store: Store, name: str, **cells: Cell) -> Comparison:
    """The small comparison with some of its cells replaced."""
    kept = [cells.get(cell.defense, cell) for cell in small_cells()]
    store.comparison(name, kept)
    return load_comparison(store.uri, name)


def test_what_holds_leaks_and_shows_nothing(comparison: Comparison) -> None:
    text = told(comparison)
    assert "ceiling: Without a defense DLG recovers 3 of 3 MNIST images (46.00 dB on average) above 30 dB." in text
    assert "protection: DLG gets no closer than a blind guess against GradDefense, DP-L and PLD on MNIST." in text
    assert "leak: DLG sees more than a blind guess through GC (MNIST: PSNR 21.00 dB, SSIM 0.210)." in text
    assert "caution: DLG stalled or ran out of budget, so nothing is shown, against DP-G on MNIST." in text
    assert "undoes it: PSNR rises from 5.50 dB to 45.00 dB on MNIST." in text


def test_costs_are_against_the_same_training_without_a_defense(comparison: Comparison) -> None:
    text = told(comparison)
    assert "GradDefense −1.0 points of ACC and +4.0 % of round time" in text
    assert "GC −55.0 points of ACC and +1.0 % of round time" in text
    assert "PLD −2.0 points of ACC." in text


def test_other_data_gives_other_sentences(store: Store) -> None:
    weak = Cell("dga", "mnist", "none", [9.0, 10.0, 11.0], acc=0.92)
    leaking = Cell("dga", "mnist", "graddefense", [35.0, 36.0, 37.0], acc=0.91)
    held = Cell("dga", "mnist", "pld", [5.0, 5.5, 6.0], muted=[5.0, 5.6, 6.1], acc=0.9)
    text = told(changed(store, "other", none=weak, graddefense=leaking, pld=held))
    assert "On MNIST DLG is not shown to beat a blind guess even without a defense" in text
    assert "GradDefense (MNIST: PSNR 36.00 dB, SSIM 0.360, 3 of 3 recovered)" in text
    assert "does not clearly help: PSNR goes from 5.50 dB to 5.57 dB on MNIST." in text
    assert "undoes it" not in text


def test_a_weak_attack_is_told(store: Store) -> None:
    weak = Cell("dga", "mnist", "none", [24.0, 25.0, 31.0], acc=0.92)
    text = told(changed(store, "weak", none=weak))
    assert "On MNIST DLG recovers less than half of the images even without a defense" in text
    assert "not shown to beat" not in text


def test_a_muted_attack_on_one_data_set_only(store: Store) -> None:
    cells = [Cell("dga", "digits", "mine", [5.0, 5.1], muted=[40.0, 41.0]), Cell("dga", "mnist", "none", [40.0])]
    store.comparison("uneven", cells)
    assert "undoes it: PSNR rises from 5.05 dB to 40.50 dB on Digits." in told(
        load_comparison(store.uri, "uneven")
    )


def test_missing_cells_and_a_missing_baseline_are_told(store: Store) -> None:
    planned = {"datasets": ["digits"], "tables": {"dga": {}}, "defenses": {"none": {}, "gc": {}}, "seeds": [0]}
    store.comparison("bare", [Cell("dga", "digits", "gc", [9.0, 9.5])], planned)
    text = told(load_comparison(store.uri, "bare"))
    assert "1 planned cell is not finished." in text
    assert "DLG was not tried without a defense: nothing shows its power." in text
    assert "slides" not in text


def test_differences_need_size_and_an_interval_that_excludes_the_slides(block: Block) -> None:
    apart = {(d.column, d.metric) for d in differences([block]) if d.material}
    assert ("dp_gaussian", "ACC") in apart
    assert ("pld_muted", "PSNR") in apart
    assert ("gc", "ACC") not in apart
    # 6.00 dB here and 9.41 dB there are both below the floor of 12 dB: no difference in protection.
    assert ("graddefense", "PSNR") not in apart


def test_ranks_that_our_intervals_turn_round(block: Block) -> None:
    # GC is faster than GradDefense here and there; DP-G has no overhead here.
    assert reversals([block]) == []


@pytest.mark.parametrize(("rival", "expected"), [(0.95, 1), (0.905, 0)])
def test_a_reversed_rank_is_told(store: Store, rival: float, expected: int) -> None:
    # The slides: GradDefense 90.43 %, DP-G 10.37 %; ours: GradDefense 91 %.
    other = Cell("dga", "mnist", "dp_gaussian", [4.0, 4.1, 4.2], acc=rival)
    sentences = reversals(summarise(changed(store, f"ranks{rival}", dp_gaussian=other)))
    assert len([line for line in sentences if "GradDefense is more accurate than DP-G" in line]) == expected
