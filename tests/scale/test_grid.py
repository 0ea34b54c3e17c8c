from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.datasets import load_dataset
from fedsim.errors import ConfigError
from fedsim.scale.grid import Cell, Workload, parse_scale, shared_partition


def test_strong_and_weak_scaling_share_their_common_cells() -> None:
    config = parse_scale({"clients": [20, 40], "workers": [1, 2], "weak": 20, "defenses": ["none"]}, {}, "test")
    pairs = [(cell.clients, cell.workers) for cell in config.cells()]
    assert pairs == [(20, 1), (20, 2), (40, 1), (40, 2)], "20 × 1 and 20 × 2 of weak scaling are there already"
    more = parse_scale({"clients": [20], "workers": [1, 2], "weak": 30, "defenses": ["none"]}, {}, "test")
    assert [(c.clients, c.workers) for c in more.cells()] == [(20, 1), (20, 2), (30, 1), (60, 2)]


def test_one_actor_a_client_is_a_worker_and_a_chunk_for_each() -> None:
    config = parse_scale({"actors": [3, 2], "defenses": ["none", "gc"]}, {}, "test")
    assert config.actor_cells() == [Cell(n, n, 1, d) for n in (2, 3) for d in ("none", "gc")]


def test_widths_are_those_of_a_run_or_those_given() -> None:
    options = {"clients": [10, 100, 1000], "workers": [1], "weak": 0, "defenses": ["none"]}
    auto = parse_scale(options, {}, "test").cells()
    assert [(cell.clients_per_chunk, cell.chunks) for cell in auto] == [(2, 8), (13, 8), (16, 64)]
    given = parse_scale({**options, "widths": [4, 200]}, {}, "test").cells()
    assert [cell.clients_per_chunk for cell in given] == [4, 10, 4, 100, 4, 200], (
        "a chunk is no wider than the cohort"
    )


def test_a_cell_is_an_experiment_with_its_settings() -> None:
    config = parse_scale({"defenses": ["gc"]}, {"federation": {"batch_size": 7}, "seed": 5}, "test")
    experiment = config.experiment_at(Cell(40, 3, 5, "gc"))
    federation, runtime = experiment.federation, experiment.runtime
    assert (federation.clients, federation.clients_per_round, federation.batch_size) == (40, 40, 7)
    assert (runtime.workers, runtime.clients_per_chunk, experiment.defense.name, experiment.seed) == (
        3,
        5,
        "gc",
        5,
    )


@pytest.mark.parametrize(
    ("options", "settings", "fragment"),
    [
        ({"clients": [0]}, {}, "clients must be at least 1, got 0"),
        ({"workers": [1, 1]}, {}, "twice: 1 1"),
        ({"widths": [0]}, {}, "widths must be at least 1"),
        ({"rounds": 0}, {}, "rounds"),
        ({"defenses": ["gcc"]}, {}, "did you mean 'gc'"),
        ({}, {"federation": {"clients": 5}}, "use --clients"),
        ({}, {"defense": {"sigma": 1}}, "use --defenses"),
        ({}, {"attacks": [{"name": "dlg"}]}, "no attacks"),
        ({}, {"federation": {"batch": 5}}, "batch"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], settings: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        parse_scale(options, settings, "test")


def test_equal_studies_have_equal_fingerprints() -> None:
    one = parse_scale({"clients": [5]}, {}, "test")
    assert one.fingerprint() == parse_scale({"clients": [5], "cluster": [3]}, {}, "test").fingerprint()
    assert one.fingerprint() != parse_scale({"clients": [6]}, {}, "test").fingerprint()
    assert one.fingerprint() != parse_scale({"clients": [5]}, {"seed": 1}, "test").fingerprint()


@given(st.integers(1, 60), st.integers(1, 80), st.integers(1, 60), st.integers(0, 2**32))
def test_every_client_holds_as_many_different_images_and_no_image_is_held_much_more_often(
    total: int, clients: int, images: int, seed: int
) -> None:
    indices = np.arange(total) * 3 + 1
    if images > total:
        with pytest.raises(ConfigError, match="--images"):
            shared_partition(indices, clients, images, seed)
        return
    parts = shared_partition(indices, clients, images, seed)
    assert parts.clients == clients
    held = [parts.client(client) for client in range(clients)]
    assert all(len(set(own)) == images and set(own) <= set(indices) for own in held)
    times = np.unique(np.concatenate(held), return_counts=True)[1].max()
    assert times <= -(-clients // (total // images)), "one deal holds each image once at most"
    again = shared_partition(indices, clients, images, seed)
    assert (again.order == parts.order).all()


def test_a_cohort_larger_than_the_data_set_trains_on_full_batches() -> None:
    config = parse_scale({"clients": [2000]}, {}, "test")
    workload = Workload(config, load_dataset(config.experiment.data))
    spec = workload.spec(Cell(2000, 1, 16, "none"))
    assert list(spec.cohort(0)) == list(range(2000))
    assert [len(batch) for batch in spec.schedule(0, 1999)] == [32]
    assert not set(spec.root) & set(spec.partition.order)
