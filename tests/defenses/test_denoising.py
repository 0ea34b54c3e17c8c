import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.defenses.denoising import marchenko_pastur_denoise, published_denoise, published_shape
from fedsim.errors import ConfigError
from tests.defenses import published_reference


def gaussian(size, seed=0, std=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, std, size))


def low_rank(size, seed=0, rank=3):
    """A vector that folds into a matrix of low rank whatever the width, since it repeats smoothly."""
    rng = np.random.default_rng(seed)
    grid = np.arange(size)
    waves = [rng.normal() * np.sin(grid * 2 * math.pi / (size / (k + 1))) for k in range(rank)]
    return torch.from_numpy(np.sum(waves, axis=0))


def dense_reference(vector, noise_std, aspect):
    """Singular values of the padded matrix against the square root of the bulk's edges."""
    size = len(vector)
    columns = max(1, round(math.sqrt(size / aspect)))
    rows = math.ceil(size / columns)
    matrix = np.zeros(rows * columns)
    matrix[:size] = vector
    left, singular, right = np.linalg.svd(matrix.reshape(rows, columns), full_matrices=False)
    root = np.sqrt(size / columns)
    low = abs(1 - math.sqrt(columns / root**2)) * noise_std * root
    high = (1 + math.sqrt(columns / root**2)) * noise_std * root
    kept = np.where((singular > low) & (singular < high), 0, singular)
    return (left * kept @ right).reshape(-1)[:size]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.floats(0, 3), st.floats(1, 10), st.integers(0, 100))
def test_agrees_with_a_dense_reference_for_any_length(size, noise_std, aspect, seed):
    vector = low_rank(size, seed) + gaussian(size, seed + 1, 0.5)
    expected = dense_reference(vector.numpy(), noise_std, aspect)
    assert np.abs(marchenko_pastur_denoise(vector, noise_std, aspect).numpy() - expected).max() < 1e-9


def test_pure_noise_is_removed_and_a_strong_component_is_kept():
    noise, signal = gaussian(13427, std=0.1), low_rank(13427)
    removed = marchenko_pastur_denoise(noise, 0.1)
    assert removed.norm() < 0.3 * noise.norm()
    assert (marchenko_pastur_denoise(signal + noise, 0.1) - signal).norm() < 0.5 * noise.norm()


def test_output_is_a_projection_of_the_same_kind():
    vector = (low_rank(2000) + gaussian(2000)).float()
    result = marchenko_pastur_denoise(vector, 1.0)
    assert result.dtype == vector.dtype and result.shape == vector.shape
    # Kept and removed part are orthogonal but for the padding.
    assert abs(torch.dot(result, vector - result)) < 2e-3 * vector.dot(vector)


@given(st.floats(1e-3, 1e3))
def test_scaling_input_and_noise_scales_the_output(factor):
    vector = low_rank(600) + gaussian(600)
    expected = factor * marchenko_pastur_denoise(vector, 0.7)
    assert torch.allclose(marchenko_pastur_denoise(factor * vector, factor * 0.7), expected, rtol=1e-6)


@pytest.mark.parametrize("denoise", [marchenko_pastur_denoise, published_denoise])
def test_no_noise_removes_nothing(denoise):
    vector = low_rank(1200) + gaussian(1200)
    assert torch.allclose(denoise(vector, 0.0), vector)


@pytest.mark.parametrize("denoise", [marchenko_pastur_denoise, published_denoise])
def test_bad_input_is_refused_and_divergence_shows(denoise):
    with pytest.raises(ValueError, match="negative"):
        denoise(torch.zeros(12), -1.0)
    with pytest.raises(ValueError, match="vector"):
        denoise(torch.zeros(3, 4), 1.0)
    assert denoise(torch.full((1200,), torch.nan), 1.0).isnan().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 900), st.floats(0, 3), st.floats(2, 8), st.integers(0, 100))
def test_published_agrees_with_its_reference(size, noise_std, aspect, seed):
    # Not a square matrix: there the bulk starts at 0, where the centred covariance has an eigenvalue of its own.
    try:
        published_shape(size, aspect)
    except ConfigError:
        assume(False)
    vector = low_rank(size, seed) + gaussian(size, seed + 1, 0.5)
    expected = published_reference.denoise(vector.numpy(), noise_std, aspect)
    assert np.abs(published_denoise(vector, noise_std, aspect).numpy() - expected).max() < 1e-6


def test_published_shape_is_the_least_sufficient_divisor():
    assert published_shape(13426, 6.0) == (959, 14)
    assert published_shape(15826, 6.0) == (386, 41)
    assert published_shape(600, 6.0) == (60, 10)


@pytest.mark.parametrize("size", [13, 22, 1])
def test_published_refuses_what_folds_into_one_column(size):
    with pytest.raises(ConfigError, match=f"cannot fold {size} parameters"):
        published_denoise(torch.ones(size), 1.0)
