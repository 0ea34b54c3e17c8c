import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.defenses.pruning import count_nonzero, keep_largest, pruned_count


@given(st.integers(1, 300), st.integers(0, 99))
def test_count_is_what_lies_below_the_percentile(size, percent):
    values = np.arange(size, dtype=float)
    expected = (values < np.percentile(values, percent) - 1e-9).sum()
    assert pruned_count(size, percent / 100) == expected


def test_nothing_is_pruned_from_one_value_or_by_fraction_zero():
    assert pruned_count(1, 0.99) == 0
    assert pruned_count(50, 0.0) == 0


@given(st.integers(1, 5), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 0.99))
def test_what_is_kept_is_what_sorting_keeps(clients, sizes, fraction):
    values = torch.from_numpy(np.random.default_rng(sizes).integers(-9, 9, (clients, sum(sizes)))).float()
    before, out = values.clone(), keep_largest(values, sizes, fraction)
    assert torch.equal(values, before)
    for part, kept_part in zip(values.split(sizes, dim=1), out.split(sizes, dim=1), strict=True):
        for row, kept in zip(part.tolist(), kept_part.tolist(), strict=True):
            threshold = sorted(map(abs, row))[pruned_count(len(row), fraction)]
            assert kept == [value if abs(value) >= threshold else 0.0 for value in row]
    assert count_nonzero(out).tolist() == [sum(value != 0 for value in row) for row in out.tolist()]


def test_a_value_that_is_not_finite_is_still_not():
    values = torch.tensor([[1.0, float("inf"), float("nan")], [1.0, 2.0, 3.0]])
    out = keep_largest(values, [3], 0.5)
    assert out[0].isfinite().tolist() == [True, False, False]
    assert out[1].tolist() == [0, 2, 3]
