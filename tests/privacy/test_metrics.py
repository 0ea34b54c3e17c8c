import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from fedsim.privacy.metrics import PSNR_CAP, floors, score


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_agrees_with_the_definition_and_with_scikit_image(channels):
    truth, guess = images(2, 1, channels, 28, 28), images(2, 1, channels, 28, 28, seed=1)
    for victim, row in enumerate(score(truth, guess)):
        error = float(((truth[victim].double() - guess[victim].double()) ** 2).mean())
        assert row.PSNR == pytest.approx(-10 * np.log10(error), abs=1e-9)
        one_channel = [
            structural_similarity(a.double().numpy(), b.double().numpy(), data_range=1)
            for a, b in zip(truth[victim, 0], guess[victim, 0], strict=True)
        ]
        assert row.SSIM == pytest.approx(np.mean(one_channel), abs=1e-9)
        assert (row.victim, row.image, row.matched, row.capped) == (victim, 0, 0, False)


def test_known_error_gives_known_psnr():
    truth = torch.full((1, 1, 1, 8, 8), 0.5)
    assert score(truth, truth + 0.1)[0].PSNR == pytest.approx(20.0, abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 1000))
def test_a_permuted_batch_is_matched_back(order, seed):
    truth = images(1, 5, 1, 8, 8, seed=seed)
    guess = truth + 0.01 * images(1, 5, 1, 8, 8, seed=seed + 1)
    straight, shuffled = score(truth, guess), score(truth, guess[:, order])
    assert [order[row.matched] for row in shuffled] == list(range(5))
    assert [row.PSNR for row in shuffled] == [row.PSNR for row in straight]


def test_matching_minimises_the_total_error_not_each_ones_own():
    # Both originals are nearest to the first guess; only one of them can have it.
    truth = torch.stack([torch.full((1, 8, 8), v) for v in (0.50, 0.60)])[None]
    guess = torch.stack([torch.full((1, 8, 8), v) for v in (0.58, 0.30)])[None]
    assert [row.matched for row in score(truth, guess)] == [1, 0]


def test_clamps_before_it_compares():
    truth = torch.ones(1, 1, 1, 8, 8)
    row = score(truth, truth * 40)[0]
    assert row.PSNR == PSNR_CAP and row.capped and row.SSIM == pytest.approx(1)


def test_a_better_reconstruction_scores_higher():
    truth, noise = images(1, 1, 3, 16, 16), images(1, 1, 3, 16, 16, seed=1) - 0.5
    rows = [score(truth, truth + scale * noise)[0] for scale in (0.01, 0.1, 1.0)]
    assert rows[0].PSNR > rows[1].PSNR > rows[2].PSNR
    assert rows[0].SSIM > rows[1].SSIM > rows[2].SSIM


def test_pixels_that_are_not_numbers_count_as_grey():
    truth = torch.full((1, 1, 1, 8, 8), 0.6)
    assert score(truth, torch.full_like(truth, torch.nan))[0].PSNR == pytest.approx(20.0, abs=1e-5)


def test_images_smaller_than_the_window_are_scored():
    assert np.isfinite(score(images(1, 1, 1, 4, 6), images(1, 1, 1, 4, 6, seed=1))[0].SSIM)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 8, 8\) and \(1, 1, 1, 8, 8\)"):
        score(images(1, 2, 1, 8, 8), images(1, 1, 1, 8, 8))


def test_floors_match_their_closed_forms():
    truth = images(40, 1, 1, 28, 28)
    found = floors(truth, truth.mean((0, 1)), seed=3)
    error = {name: np.mean([10 ** (-r.PSNR / 10) for r in rows]) for name, rows in found.items()}
    # U[0,1) truth: E(u−½)² = 1/12, E(u−u')² = 1/6; clamped N(0,1) has mean and mean square below.
    mean = 0.5 * (1 - 0.6826894921) + (1 - np.exp(-0.5)) / np.sqrt(2 * np.pi)
    square = (1 - 0.6826894921) / 2 + 0.5 * 0.6826894921 - np.exp(-0.5) / np.sqrt(2 * np.pi)
    expected = {"noise": 1 / 3 - mean + square, "uniform": 1 / 6, "mean": 1 / 12 * 39 / 40, "grey": 1 / 12}
    assert error == pytest.approx(expected, rel=0.02)


def test_floors_depend_on_their_seed_alone():
    truth = images(2, 2, 1, 8, 8)
    mean = truth.mean((0, 1))
    assert floors(truth, mean, 1) == floors(truth, mean, 1)
    assert floors(truth, mean, 1)["noise"] != floors(truth, mean, 2)["noise"]
