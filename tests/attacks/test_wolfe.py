import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.attacks.wolfe import CURVATURE, DECREASE, MOST_TRIALS, Search

FUNCTIONS = {
    "parabola": (lambda t, p: (t - p) ** 2, lambda t, p: 2 * (t - p)),
    "quartic": (lambda t, p: (t - p) ** 4, lambda t, p: 4 * (t - p) ** 3),
    "valley": (lambda t, p: -t / (t**2 + p), lambda t, p: (t**2 - p) / (t**2 + p) ** 2),
    "wavy": (
        lambda t, p: 0.5 * (t - p) ** 2 + 0.3 * torch.sin(5 * t),
        lambda t, p: (t - p) + 1.5 * torch.cos(5 * t),
    ),
    "wall": (
        lambda t, p: torch.where(t < p, -t - 0.1 * p * torch.log(1 - t / p), torch.nan),
        lambda t, p: torch.where(t < p, -1 + 0.1 / (1 - t / p), torch.nan),
    ),
}


def search(function, slope, parameter, step):
    """Run searches of f(t; p) for a vector of parameters p and first steps; return how each ended."""
    parameter, step = (torch.tensor(v, dtype=torch.float64) for v in (parameter, step))
    zero = torch.zeros_like(parameter)
    at_zero = function(zero, parameter), slope(zero, parameter)
    tiny = torch.full_like(zero, 1e-14)
    run = Search.start(step, *at_zero, tiny, at_zero[1][:, None])
    pending = torch.ones_like(zero, dtype=torch.bool)
    ends = torch.full_like(zero, torch.nan)
    for _ in range(MOST_TRIALS):
        t = run.step
        done = run.advance(function(t, parameter), slope(t, parameter), slope(t, parameter)[:, None])
        ends = torch.where(pending & done, run.low_step, ends)
        pending &= ~done
        if not pending.any():
            break
    return ends, at_zero, parameter


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.lists(st.tuples(st.floats(0.3, 20), st.floats(1e-3, 1e2)), min_size=1, max_size=6),
)
def test_every_search_ends_at_a_strong_wolfe_point(name, cases):
    function, slope = FUNCTIONS[name]
    ends, (f0, s0), parameter = search(function, slope, *zip(*cases, strict=True))
    assume((s0 < 0).all())
    assert torch.isfinite(ends).all()
    assert (function(ends, parameter) <= f0 + DECREASE * ends * s0).all()
    assert (slope(ends, parameter).abs() <= -CURVATURE * s0).all()


def test_a_search_in_a_batch_ends_where_it_ends_alone():
    function, slope = FUNCTIONS["wavy"]
    parameters, steps = [2.0, 4.0, 9.0, 16.0], [0.01, 1.0, 30.0, 0.2]
    together, _, _ = search(function, slope, parameters, steps)
    alone = [search(function, slope, [p], [t])[0] for p, t in zip(parameters, steps, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_the_first_zoom_into_a_parabola_hits_its_minimum():
    function, slope = FUNCTIONS["parabola"]
    ends, _, _ = search(function, slope, [1.0, 3.0], [10.0, 25.0])
    assert ends.tolist() == pytest.approx([1.0, 3.0])


def test_a_step_that_is_good_enough_is_taken_as_it_is():
    function, slope = FUNCTIONS["parabola"]
    assert search(function, slope, [1.0], [0.7])[0].tolist() == [0.7]


def test_where_nothing_is_lower_the_step_is_zero():
    # The slope lies: the function rises.
    ends, _, _ = search(lambda t, p: t * p, lambda t, p: torch.where(t == 0, -p, p), [1.0], [1.0])
    assert ends.tolist() == [0.0]


def test_nan_everywhere_ends_at_zero():
    ends, _, _ = search(
        lambda t, p: torch.where(t == 0, p, math.nan), lambda t, p: torch.where(t == 0, -p, math.nan), [1.0], [1.0]
    )
    assert ends.tolist() == [0.0]
