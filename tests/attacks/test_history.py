"""The compact form against the two-loop recursion."""

import pytest
import torch

from fedsim.attacks.history import History
from tests.attacks.problems import generator


def two_loops(pairs, gradient):
    """−H∇ for one problem, from its pairs (s, y), oldest first. Nocedal and Wright, algorithm 7.4."""
    q, shares = gradient.clone(), []
    for s, y in reversed(pairs):
        share = (s @ q) / (s @ y)
        q -= share * y
        shares.append(share)
    if pairs:
        s, y = pairs[-1]
        q *= (s @ y) / (y @ y)
    for (s, y), share in zip(pairs, reversed(shares), strict=True):
        q += s * (share - (y @ q) / (s @ y))
    return -q


def random_pairs(count, problems, dimension, seed=0):
    """Pairs as a convex quadratic of each problem's own would give them: y = A s."""
    draw = generator(seed)
    a = torch.randn(problems, dimension, dimension, generator=draw, dtype=torch.float64)
    a = a @ a.mT + torch.eye(dimension, dtype=torch.float64)
    s = torch.randn(count, problems, dimension, generator=draw, dtype=torch.float64)
    return [(step, torch.einsum("mij,mj->mi", a, step)) for step in s]


@pytest.mark.parametrize("length", [1, 3, 7])
def test_direction_is_that_of_the_two_loop_recursion(length):
    problems, dimension = 3, 9
    history = History(problems, dimension, length, torch.zeros(1, dtype=torch.float64))
    gradient = torch.randn(problems, dimension, generator=generator(1), dtype=torch.float64)
    everyone = torch.ones(problems, dtype=torch.bool)
    kept = []
    for s, y in random_pairs(12, problems, dimension):
        history.push(everyone, s, y)
        kept = [*kept, (s, y)][-length:]
        for row, found in enumerate(history.direction(gradient)):
            wanted = two_loops([(s[row], y[row]) for s, y in kept], gradient[row])
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_problems_with_different_numbers_of_pairs_do_not_meddle():
    problems, dimension, length = 4, 6, 3
    history = History(problems, dimension, length, torch.zeros(1, dtype=torch.float64))
    gradient = torch.randn(problems, dimension, generator=generator(1), dtype=torch.float64)
    kept = [[] for _ in range(problems)]
    for number, (s, y) in enumerate(random_pairs(9, problems, dimension)):
        taken = torch.tensor([number % (row + 1) == 0 for row in range(problems)])
        history.push(taken, s, y)
        for row in taken.nonzero()[:, 0].tolist():
            kept[row] = [*kept[row], (s[row], y[row])][-length:]
    wanted = torch.stack([two_loops(pairs, g) for pairs, g in zip(kept, gradient, strict=True)])
    torch.testing.assert_close(history.direction(gradient), wanted, rtol=1e-6, atol=1e-8)

    history.forget(torch.tensor([False, True, False, False]))
    wanted[1] = -gradient[1]
    torch.testing.assert_close(history.direction(gradient), wanted, rtol=1e-6, atol=1e-8)

    rows = torch.tensor([3, 1])
    history.select(rows)
    torch.testing.assert_close(history.direction(gradient[rows]), wanted[rows], rtol=1e-6, atol=1e-8)


def test_without_pairs_it_is_the_steepest_descent():
    gradient = torch.randn(2, 5, generator=generator())
    assert torch.equal(History(2, 5, 4, gradient).direction(gradient), -gradient)
