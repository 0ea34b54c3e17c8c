import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedsim.data.partitions import (
    DirichletConfig,
    IIDConfig,
    Partition,
    PartitionConfig,
    ShardsConfig,
    partition,
)
from fedsim.errors import ConfigError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
ALL = np.arange(len(LABELS))


@st.composite
def problems(draw):
    """Labels of any balance, a subset of them to divide, and a number of clients that it is enough for."""
    totals = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = rng.permutation(np.repeat(np.arange(len(totals)), totals))
    indices = rng.permutation(len(labels))[: draw(st.integers(1, len(labels)))]
    clients = draw(st.integers(1, len(indices)))
    minimum = draw(st.integers(1, len(indices) // clients))
    return labels, indices, clients, minimum


def assert_exact_cover(result: Partition, indices):
    held = [result.client(client) for client in range(result.clients)]
    assert sorted(np.concatenate(held)) == sorted(indices)
    assert all((np.diff(part) > 0).all() for part in held)
    assert result.order.dtype == result.offsets.dtype == np.int64


@settings(deadline=None)
@given(problems(), st.integers(0, 99))
def test_iid_covers_with_equal_sizes(problem, seed):
    labels, indices, clients, minimum = problem
    result = partition(labels, indices, clients, IIDConfig(min_per_client=minimum), seed)
    assert_exact_cover(result, indices)
    assert len(result.sizes) == clients
    assert np.ptp(result.sizes) <= 1 and result.sizes.min() >= minimum


@settings(deadline=None)
@given(problems(), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_dirichlet_covers_and_respects_the_minimum(problem, alpha, seed):
    labels, indices, clients, minimum = problem
    config = DirichletConfig(alpha=alpha, min_per_client=minimum)
    result = partition(labels, indices, clients, config, seed)
    assert_exact_cover(result, indices)
    assert result.sizes.min() >= minimum


@settings(deadline=None)
@given(problems(), st.integers(1, 4), st.integers(0, 99))
def test_shards_give_every_client_exactly_the_asked_number_of_classes(problem, wanted, seed):
    labels, indices, clients, _ = problem
    totals = np.unique(labels[indices], return_counts=True)[1]
    feasible = wanted <= len(totals) <= clients * wanted and np.minimum(totals, clients).sum() >= clients * wanted
    if not feasible:
        with pytest.raises(ConfigError, match=r"data\.partition: .*classes_per_client"):
            partition(labels, indices, clients, ShardsConfig(classes_per_client=wanted), seed)
        return
    result = partition(labels, indices, clients, ShardsConfig(classes_per_client=wanted), seed)
    assert_exact_cover(result, indices)
    counts = result.counts(labels)
    assert ((counts > 0).sum(axis=1) == wanted).all()
    for column in counts.T:
        assert not column.any() or np.ptp(column[column > 0]) <= 1


@pytest.mark.parametrize("config", [IIDConfig(), DirichletConfig(alpha=0.3), ShardsConfig()])
def test_a_partition_is_a_function_of_the_seed(config):
    one, same, other = (partition(LABELS, ALL, 30, config, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.order, same.order) and np.array_equal(one.offsets, same.offsets)
    assert not np.array_equal(one.order, other.order)


def test_read_only_input_is_enough():
    labels, indices = LABELS.copy(), ALL.copy()
    labels.flags.writeable = indices.flags.writeable = False
    for config in (IIDConfig(), DirichletConfig(), ShardsConfig()):
        assert_exact_cover(partition(labels, indices, 20, config, 0), ALL)


def test_a_large_alpha_is_nearly_iid_and_a_small_one_is_not():
    even = partition(LABELS, ALL, 20, DirichletConfig(alpha=1e6), 0).counts(LABELS)
    assert abs(even - 30).max() <= 2
    skewed = partition(LABELS, ALL, 20, DirichletConfig(alpha=0.05), 0).counts(LABELS)
    assert (skewed.max(axis=1) / skewed.sum(axis=1)).mean() > 0.6


def test_a_large_alpha_is_nearly_even_with_more_clients_than_images_a_class():
    sizes = partition(LABELS, ALL, 1000, DirichletConfig(alpha=1e6), 0).sizes
    assert sizes.min() >= 2 and sizes.max() <= 10


def test_dirichlet_shares_have_the_variance_of_the_distribution():
    # A share of Dir(α, …, α) over n clients has mean 1/n and variance (n − 1) / (n²(nα + 1)).
    labels, clients, alpha = np.zeros(20_000, np.int64), 10, 0.7
    shares = np.concatenate(
        [
            partition(labels, np.arange(20_000), clients, DirichletConfig(alpha=alpha), seed).sizes / 20_000
            for seed in range(300)
        ]
    )
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    # The standard error of this estimate is about 4 %.
    assert shares.var() == pytest.approx(expected, rel=0.16)


def test_repair_moves_no_more_than_is_lacking():
    config = DirichletConfig(alpha=0.01, min_per_client=40)
    result = partition(LABELS, ALL, 100, config, 0)
    sizes = np.sort(result.sizes)
    assert sizes[0] == 40 and sizes[-1] > 100
    assert (sizes == 40).sum() > 50


def test_shards_deal_classes_evenly_when_the_data_are_balanced():
    counts = partition(LABELS, ALL, 30, ShardsConfig(classes_per_client=3), 0).counts(LABELS)
    assert set(counts[counts > 0]) <= {66, 67}
    assert len({tuple(row > 0) for row in counts}) > 10


def test_ten_thousand_clients():
    labels = np.arange(60_000) % 10
    for config in (IIDConfig(), DirichletConfig(alpha=0.1, min_per_client=2), ShardsConfig()):
        result = partition(labels, np.arange(60_000), 10_000, config, 0)
        assert result.clients == 10_000 and result.sizes.sum() == 60_000 and result.sizes.min() >= 1


def test_counts_agree_with_counting():
    result = partition(LABELS, ALL[::2], 7, DirichletConfig(), 3)
    counts = result.counts(LABELS, classes=12)
    assert counts.shape == (7, 12)
    for client in range(7):
        assert counts[client].tolist() == [sum(LABELS[i] == c for i in result.client(client)) for c in range(12)]


def test_there_is_no_client_beyond_the_last():
    result = partition(LABELS, ALL, 3, IIDConfig(), 0)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            result.client(index)


@pytest.mark.parametrize("config", [IIDConfig, DirichletConfig, ShardsConfig])
def test_too_few_images_are_refused(config):
    with pytest.raises(ConfigError, match=r"data\.partition: 100 clients with min_per_client 61 need 6,100"):
        partition(LABELS, ALL, 100, config(min_per_client=61), 0)


@pytest.mark.parametrize(
    ("labels", "clients", "config", "message"),
    [
        (LABELS, 20, ShardsConfig(classes_per_client=11), "the data has only 10 classes"),
        (LABELS, 4, ShardsConfig(classes_per_client=2), "no room for 10 classes"),
        (np.array([0] * 90 + [1] * 3), 50, ShardsConfig(), "too small or too uneven"),
        (np.repeat([0, 1], [99, 9]), 2, ShardsConfig(classes_per_client=1, min_per_client=10), "a client 9"),
    ],
)
def test_impossible_shards_are_refused(labels, clients, config, message):
    with pytest.raises(ConfigError, match=message):
        partition(labels, np.arange(len(labels)), clients, config, 0)


@pytest.mark.parametrize(
    "settings_",
    [
        {"name": "dirichlet", "alpha": 0},
        {"name": "dirichlet", "alpha": -1},
        {"name": "dirichlet", "alpha": float("inf")},
        {"name": "shards", "classes_per_client": 0},
        {"name": "iid", "min_per_client": 0},
        {"name": "iid", "alpha": 1},
        {"name": "dirichle"},
    ],
)
def test_bad_settings_are_refused(settings_):
    with pytest.raises(ValidationError):
        TypeAdapter(PartitionConfig).validate_python(settings_)
