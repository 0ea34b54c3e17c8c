import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedsim.defenses.slicing import equal_risk_bounds, joined_slices, published_bounds
from fedsim.errors import ConfigError
from tests.defenses import published_reference

layers = st.lists(st.tuples(st.integers(1, 200), st.floats(0, 100)), min_size=1, max_size=8)
counts = st.integers(1, 12)


def split(layers):
    return [size for size, _ in layers], np.array([risk for _, risk in layers])


@given(layers, counts)
def test_bounds_ascend_and_cover_every_entry_once(layers, slices):
    sizes, risk = split(layers)
    assume(slices <= sum(sizes))
    bounds = equal_risk_bounds(risk, sizes, slices)
    assert len(bounds) == slices + 1
    assert bounds[0] == 0 and bounds[-1] == sum(sizes)
    assert (np.diff(bounds) >= 0).all()


@given(layers, counts)
def test_every_slice_has_the_same_risk_to_within_one_entry(layers, slices):
    sizes, risk = split(layers)
    assume(slices <= sum(sizes) and risk.sum() > 1e-3)
    entries = np.repeat(risk / sizes, sizes)
    bounds = equal_risk_bounds(risk, sizes, slices)
    parts = [entries[start:stop].sum() for start, stop in zip(bounds, bounds[1:], strict=False)]
    assert np.abs(np.array(parts) - risk.sum() / slices).max() <= entries.max() + 1e-9 * risk.sum()


def test_slices_split_a_layer_in_proportion_to_its_risk():
    # Risk 1, 3 over 10, 30 entries: 0.1 an entry everywhere, so four slices are ten entries each.
    assert equal_risk_bounds(np.array([1.0, 3.0]), [10, 30], 4).tolist() == [0, 10, 20, 30, 40]
    # All risk in the last layer: it is cut in two, and the first slice takes the harmless layer along.
    assert equal_risk_bounds(np.array([0.0, 1.0]), [50, 10], 2).tolist() == [0, 55, 60]


def test_no_risk_gives_slices_of_equal_size():
    assert equal_risk_bounds(np.zeros(2), [10, 30], 4).tolist() == [0, 10, 20, 30, 40]


def test_more_slices_than_entries_are_refused():
    with pytest.raises(ConfigError, match="7 slices of a model with 5 parameters"):
        equal_risk_bounds(np.ones(2), [2, 3], 7)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(1e-3, 100)), min_size=1, max_size=8), counts)
def test_published_bounds_are_those_of_the_walk(layers, slices):
    sizes, risk = split(layers)
    ends = published_reference.slice_ends(risk.tolist(), sizes, slices)
    assume(len(ends) == slices + 1)
    assert published_bounds(risk, sizes, slices).tolist() == [0, *(end + 1 for end in ends[1:])]


def test_published_walk_repeats_a_bound_before_a_heavy_atom():
    # gcd 2; one atom of the first layer is worth 4.5 of 10 slices.
    bounds = published_bounds(np.array([9.0, 1.0, 10.0]), [4, 6, 20], 10)
    assert bounds.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 30]


def test_published_last_slice_takes_what_is_left():
    bounds = published_bounds(np.array([8.0, 2.0, 1e-10]), [8, 8, 18], 4)
    assert bounds.tolist() == [0, 2, 4, 6, 34]


def test_published_walk_that_runs_out_of_atoms_leaves_empty_slices():
    assert published_bounds(np.array([np.nextafter(1, 0), 0.0]), [1, 1], 1).tolist() == [0, 2]
    bounds = published_bounds(np.zeros(2), [4, 8], 3)
    assert bounds.tolist() == [0, 0, 0, 12]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
def test_joined_slices_hold_the_entries_of_the_chosen_ones_in_order(slices):
    lengths, chosen = zip(*slices, strict=True)
    bounds = [0, *np.cumsum(lengths).tolist()]
    expected = [at for i, taken in enumerate(chosen) if taken for at in range(bounds[i], bounds[i + 1])]
    stretches = joined_slices(bounds, chosen)
    assert [at for start, stop in stretches for at in range(start, stop)] == expected


def test_neighbours_are_one_stretch():
    assert joined_slices([0, 2, 5, 6, 9], [True, True, False, True]) == [(0, 5), (6, 9)]
