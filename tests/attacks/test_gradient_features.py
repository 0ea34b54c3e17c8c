import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.attacks.gradient_features import GradientFeatures, principal_directions, shared_ranks
from tests.attacks.problems import generator


def decaying(count: int, dimension: int) -> torch.Tensor:
    """Rows whose principal components fall off by a third each."""
    left = torch.linalg.qr(torch.randn(count, 8, generator=generator(1))).Q
    right = torch.linalg.qr(torch.randn(dimension, 8, generator=generator(2))).Q
    return left * 0.7 ** torch.arange(8) @ right.T


def test_principal_directions_are_those_of_the_full_decomposition() -> None:
    rows = decaying(60, 40)
    found = principal_directions(rows, 5, generator())
    torch.testing.assert_close(found.T @ found, torch.eye(5), atol=1e-5, rtol=0)
    exact = torch.linalg.svd(rows).Vh[:5].T
    torch.testing.assert_close(found @ found.T, exact @ exact.T, atol=1e-4, rtol=0)
    assert principal_directions(rows[:3], 5, generator()).shape == (40, 3)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.integers(1, 900))
def test_components_are_shared_evenly_and_none_is_wasted(sizes: list[int], total: int) -> None:
    ranks = shared_ranks(sizes, total)
    assert all(1 <= rank <= size for rank, size in zip(ranks, sizes, strict=True))
    assert sum(ranks) <= max(total, len(sizes))
    if total >= len(sizes):
        assert sum(ranks) == min(total, sum(sizes))
        full = [rank for rank, size in zip(ranks, sizes, strict=True) if rank < size]
        assert not full or max(full) - min(full) <= 1


def test_a_block_with_noise_in_it_shows_by_what_is_left_over() -> None:
    rows = torch.cat([decaying(200, 40), decaying(200, 60).flip(0)], 1)
    blocks = [slice(0, 40), slice(40, 100)]
    features = GradientFeatures(rows[:150], blocks, 16, generator())
    noisy = torch.rand(200, 2, generator=generator(3)) < 0.5
    noise = 0.1 * torch.randn(200, 100, generator=generator(4))
    sent = rows + noise * noisy.float().repeat_interleave(torch.tensor([40, 60]), 1)
    features.standardise(*features.raw(sent))
    components, leftovers = features(sent[150:])
    assert components.shape == (50, 16) and components.abs().max() <= 6
    assert torch.equal(leftovers > 0, noisy[150:])


def test_what_is_left_over_is_the_rest_by_pythagoras() -> None:
    rows = torch.randn(30, 12, generator=generator(5), dtype=torch.float64)
    features = GradientFeatures(rows, [slice(0, 12)], 3, generator())
    components, leftovers = features.raw(rows)
    centred = rows - rows.mean(0)
    exact = torch.linalg.svd(centred).Vh[:3].T
    rest = centred - centred @ exact @ exact.T
    assert leftovers[:, 0].exp().square().mul(12).sum() == pytest.approx(float(rest.square().sum()), rel=0.05)
    assert components.square().sum() == pytest.approx(float((centred @ exact).square().sum()), rel=0.05)
