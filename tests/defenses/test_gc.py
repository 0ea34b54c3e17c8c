import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.defenses.gc import GradientCompressionConfig
from tests.defenses.defense_cases import client_context, draw, tiny_model

MODEL = tiny_model()
CONTEXT = client_context(MODEL)


def reference(update, sizes, prune):
    """One client at a time, one parameter at a time, against NumPy's quantile."""
    result, start = update.copy(), 0
    for size in sizes:
        part = result[start : start + size]
        part[np.abs(part) < np.quantile(np.abs(part), prune) - 1e-12] = 0
        start += size
    return result


def protect(updates, prune):
    return GradientCompressionConfig(prune=prune).build().protect(updates, CONTEXT)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.01, 0.99) | st.just(0.0))
def test_agrees_with_numpy_quantile(seed, prune):
    updates = draw(4, MODEL.layout.dimension, seed=seed) - 0.5
    expected = [reference(row, MODEL.layout.sizes, prune) for row in updates.numpy()]
    assert np.array_equal(protect(updates, prune).numpy(), np.stack(expected))


def test_ties_are_kept():
    updates = torch.ones(2, MODEL.layout.dimension)
    assert torch.equal(protect(updates, 0.9), updates)


def test_input_is_left_alone_and_prune_zero_is_the_identity():
    updates = draw(4, MODEL.layout.dimension) - 0.5
    before = updates.clone()
    assert torch.equal(protect(updates, 0.0), before)
    protect(updates, 0.8)
    assert torch.equal(updates, before)


@pytest.mark.parametrize(
    ("kept", "expected"), [(0, 0), (10, 10 * 4 + 10 * 4), (31, 31 * 8), (500, 500 * 4 + 125), (1000, 4125)]
)
def test_upload_is_values_and_the_cheaper_of_indices_and_mask(kept, expected):
    protected = torch.zeros(2, 1000)
    protected[0, :kept] = 1.5
    assert GradientCompressionConfig().build().upload_bytes(protected).tolist() == [expected, 0]
