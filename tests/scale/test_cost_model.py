import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.dealing import Dealer, split_evenly
from fedsim.errors import RunError
from fedsim.scale.cost_model import CostModel, Network, Point, extrapolate, fit, hold_out

SIZES = (10, 100, 1000, 10_000)


def timed(model: CostModel, clients: int, workers: int, width: int) -> Point:
    """A round that takes what the closed form says: the slowest worker's clients, all calls, and a constant."""
    chunks = len(split_evenly(tuple(range(clients)), width))
    busiest, dealer = np.ceil(chunks / workers) * clients / chunks, Dealer(chunks, width)
    calls = len(list(iter(lambda: dealer.next(workers), None)))
    return Point(clients, workers, width, model.fixed + model.per_client * busiest + model.per_call * calls)


def rounds(model: CostModel) -> list[Point]:
    return [timed(model, c, w, k) for c in SIZES for w in (1, 2, 4) for k in (1, 16)]


costs = st.floats(min_value=1e-5, max_value=1.0)


@given(costs, costs, costs)
def test_synthetic_times_are_recovered_exactly(fixed: float, per_client: float, per_call: float) -> None:
    truth = CostModel(fixed, per_client, per_call)
    found = fit(rounds(truth))
    for point in rounds(truth):
        assert found.predict(point) == pytest.approx(point.seconds, rel=1e-6)
    assert all(abs(error) < 1e-6 for held in hold_out(rounds(truth)) for error in held.errors)


def test_terms_are_told_apart() -> None:
    truth = CostModel(0.02, 0.003, 0.0004)
    found = fit(rounds(truth))
    assert (found.fixed, found.per_client, found.per_call) == pytest.approx((0.02, 0.003, 0.0004), rel=1e-6)


@given(st.lists(st.floats(min_value=0.5, max_value=2.0), min_size=24, max_size=24))
def test_no_cost_is_negative_and_no_other_model_has_smaller_relative_errors(noise: list[float]) -> None:
    clean = rounds(CostModel(0.02, 0.003, 0.0004))
    noisy = [
        Point(p.clients, p.workers, p.clients_per_chunk, p.seconds * n) for p, n in zip(clean, noise, strict=True)
    ]
    found = fit(noisy)
    values = np.array([found.fixed, found.per_client, found.per_call])
    assert (values >= 0).all()

    def error(at: np.ndarray) -> float:
        model = CostModel(*at)
        return sum((model.predict(p) / p.seconds - 1) ** 2 for p in noisy)

    best = error(values)
    for axis in range(3):
        for factor in (0.9, 1.1):
            other = values.copy()
            other[axis] *= factor
            assert error(other) >= best * (1 - 1e-9)


def test_a_size_is_predicted_by_the_others_alone() -> None:
    truth = CostModel(0.02, 0.003, 0.0004)
    points = [
        p if p.clients < 10_000 else Point(p.clients, p.workers, p.clients_per_chunk, 2 * p.seconds)
        for p in rounds(truth)
    ]
    largest = hold_out(points)[-1]
    assert largest.clients == 10_000
    assert largest.worst == pytest.approx(-0.5, abs=1e-6)
    assert largest.median == pytest.approx(0.5, abs=1e-6)


def test_too_few_rounds_are_refused() -> None:
    points = [Point(10, 1, 2, 0.1), Point(20, 1, 2, 0.2)]
    with pytest.raises(RunError, match="three"):
        fit(points)
    assert hold_out(points) == []


def test_a_cluster_is_bounded_by_its_calls_its_serial_part_and_its_network() -> None:
    model = CostModel(0.1, 0.01, 0.001)
    network = Network(weights_bytes=1e6, partial_bytes=2e6, bytes_per_second=1e9, workers_per_node=4)
    one, four, many = extrapolate(model, network, clients=160, width=16, workers=(1, 4, 1000))
    # 16 chunks of 10 clients, dealt as 8 + 4 + 2 + 1 + 1 to one worker, as 4 × 2 + 8 × 1 to four.
    assert (one.speed_up, one.network_seconds) == (1.0, 0.0)
    assert one.seconds == pytest.approx(0.1 + 160 * 0.01 + 5 * 0.001)
    assert four.seconds == pytest.approx(0.1 + 40 * 0.01 + 12 * 0.001 + (1e6 + 12 * 2e6) / 1e9)
    assert many.seconds == pytest.approx(0.1 + 10 * 0.01 + 16 * 0.001 + (250 * 1e6 + 16 * 2e6) / 1e9)
    assert four.speed_up == pytest.approx(one.seconds / four.seconds)
