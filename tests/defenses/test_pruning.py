import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.defenses.pruning import kth_smallest, pruned_count


@given(st.integers(1, 300), st.integers(0, 99))
def test_count_is_what_lies_below_the_percentile(size, percent):
    values = np.arange(size, dtype=float)
    expected = (values < np.percentile(values, percent) - 1e-9).sum()
    assert pruned_count(size, percent / 100) == expected


def test_nothing_is_pruned_from_one_value_or_by_fraction_zero():
    assert pruned_count(1, 0.99) == 0
    assert pruned_count(50, 0.0) == 0


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_kth_smallest_is_the_sorted_value(clients, size, data):
    rank = data.draw(st.integers(0, size - 1))
    values = torch.from_numpy(np.random.default_rng(size).integers(0, 9, (clients, size))).double()
    assert torch.equal(kth_smallest(values, rank), values.sort(dim=1).values[:, rank : rank + 1])


def test_kth_smallest_leaves_its_input_alone():
    values = torch.tensor([[3.0, 1.0, 2.0]])
    kth_smallest(values, 1)
    assert values.tolist() == [[3.0, 1.0, 2.0]]
