import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.engine.session import SessionSpec
from fedsim.errors import ConfigError
from fedsim.participation import ExponentialConfig, LognormalConfig, Participation, participation, sample_size
from fedsim.preparation import prepare
from fedsim.randomness import Purpose, numpy_stream
from tests.conftest import small_experiment

LOGNORMAL = LognormalConfig(median=10, sigma=1.0, deadline=15)


def sampled(who: Participation) -> list[int]:
    return sorted([*who.clients, *who.dropped, *who.late])


def test_the_cohort_is_the_one_it_always_was_when_everyone_reports() -> None:
    """The very draw of versions that knew no dropout: final weights must not change under users' feet."""
    expected = sorted(numpy_stream(7, Purpose.COHORT, 3).choice(50, 8, replace=False).tolist())
    assert participation(7, 3, population=50, wanted=8) == Participation(tuple(expected))


@given(
    seed=st.integers(0, 1000),
    wanted=st.integers(1, 12),
    over=st.floats(1, 2),
    dropout=st.floats(0, 0.99),
    deadline=st.none() | st.floats(0.1, 100),
)
@settings(max_examples=150, deadline=None)
def test_against_a_slow_reference(
    seed: int, wanted: int, over: float, dropout: float, deadline: float | None
) -> None:
    """Clients report one after the other, and the server closes the round as Bonawitz et al. describe."""
    delays = LognormalConfig(median=10, sigma=1.0, deadline=deadline)
    who = participation(seed, 2, 30, wanted, over, dropout, delays)
    draws = numpy_stream(seed, Purpose.COHORT, 2).choice(30, sample_size(wanted, over), replace=False)
    fate = numpy_stream(seed, Purpose.DROPOUT, 2).random(30)
    seconds = 10 * np.exp(numpy_stream(seed, Purpose.DELAYS, 2).standard_normal(30))
    used: list[int] = []
    late: list[int] = []
    closed = math.inf if deadline is None else deadline
    last = 0.0
    for client in sorted((int(c) for c in draws if fate[c] >= dropout), key=lambda c: seconds[c]):
        if seconds[client] > closed or len(used) == wanted:
            late.append(client)
            continue
        used.append(client)
        last = float(seconds[client])
    assert who.clients == tuple(sorted(used)) and who.late == tuple(sorted(late))
    assert who.dropped == tuple(sorted(int(c) for c in draws if fate[c] < dropout))
    assert who.seconds == pytest.approx(last if len(used) == wanted or deadline is None else deadline)


def test_dropout_and_delays_have_the_rates_that_were_asked_for() -> None:
    rounds = [participation(0, r, 1000, 100, 1.3, 0.1, LOGNORMAL) for r in range(40)]
    dropped = np.mean([len(who.dropped) for who in rounds]) / 130
    assert dropped == pytest.approx(0.1, abs=0.02)
    on_time = np.mean([len(who.clients) for who in rounds]) / (130 * 0.9)
    expected = 0.5 * (1 + math.erf(math.log(15 / 10) / math.sqrt(2)))
    assert on_time == pytest.approx(expected, abs=0.02)
    exponential = ExponentialConfig(shift=5, mean=2).draw(np.random.default_rng(0), 100_000)
    assert exponential.min() >= 5 and exponential.mean() == pytest.approx(7, abs=0.05)


def test_a_clients_fate_does_not_depend_on_who_else_was_sampled() -> None:
    few, many = (participation(1, 0, 100, 40, over, 0.3, LOGNORMAL) for over in (1.0, 2.0))
    both = set(sampled(few)) & set(sampled(many))
    assert both and set(few.dropped) & both == set(many.dropped) & both


def test_without_stragglers_the_first_are_those_sampled_first_not_the_lowest_numbers() -> None:
    means = [np.mean(participation(0, r, 1000, 10, 2.0).clients) for r in range(200)]
    assert np.mean(means) == pytest.approx(499.5, abs=25)


@pytest.mark.parametrize(("wanted", "over", "size"), [(10, 1.0, 10), (10, 1.1, 11), (9, 1.2, 11), (7, 1.0001, 8)])
def test_over_sampling_rounds_up_but_not_on_floating_point_dust(wanted: int, over: float, size: int) -> None:
    assert sample_size(wanted, over) == size


def spec(**federation: Any) -> SessionSpec:
    return prepare(small_experiment(federation=federation), digits()).spec


def digits() -> Any:
    from fedsim.data.datasets import DigitsConfig, load_dataset

    return load_dataset(DigitsConfig())


def test_the_config_asks_for_what_is_drawn() -> None:
    stragglers = {"name": "exponential", "mean": 3, "deadline": 4}
    drawn = spec(dropout=0.2, over_sampling=1.5, stragglers=stragglers).participation(5)
    expected = participation(0, 5, 20, 9, 1.5, 0.2, ExponentialConfig(mean=3, deadline=4))
    assert drawn == expected and drawn.seconds is not None


def test_training_payloads_come_from_clients_that_report() -> None:
    config = small_experiment(
        federation={"dropout": 0.5}, audit={"payload": "training", "victims": 9}, attacks=[{"name": "dlg"}]
    )
    prepared = prepare(config, digits())
    who = prepared.spec.participation(0)
    assert who.dropped and {victim.client for victim in prepared.victims[0]} <= set(who.clients)
    late = {"stragglers": {"name": "exponential", "shift": 5, "deadline": 1}}
    config = small_experiment(federation=late, audit={"payload": "training"}, attacks=[{"name": "dlg"}])
    with pytest.raises(ConfigError, match="no client reports in time in round 0"):
        prepare(config, digits())
