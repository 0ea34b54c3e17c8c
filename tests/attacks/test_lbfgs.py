import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.attacks.distances import SquaredError
from fedsim.attacks.dummies import MID_GREY, Dummies
from fedsim.attacks.gradient_matching import GradientMatching
from fedsim.attacks.lbfgs import LBFGS, minimise
from tests.attacks.problems import generator, lenet, observe, victims


def differentiated(function):
    """The objective of a function of (points [m, n], problems [m]) that returns losses [m]."""

    def objective(x: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = function(x, problems)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), gradient

    return objective


def rosenbrock(x, problems):
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def quadratics(problems, dimension, seed=0, offset=0.0):
    """½(x − s)ᵀA(x − s) + offset with A of condition 1e3 and As = b: the objective and the minima s.

    Not multiplied out, because near the minimum the three terms would cancel to rounding noise.
    """
    draw = generator(seed)
    q, _ = torch.linalg.qr(torch.randn(problems, dimension, dimension, generator=draw, dtype=torch.float64))
    a = q @ torch.diag(torch.logspace(0, 3, dimension, dtype=torch.float64)) @ q.mT
    b = torch.randn(problems, dimension, generator=draw, dtype=torch.float64)
    solution = torch.linalg.solve(a, b)

    def function(x, rows):
        apart = x - solution[rows]
        return 0.5 * torch.einsum("mi,mij,mj->m", apart, a[rows], apart) + offset

    return differentiated(function), solution


def torch_lbfgs(function, start, iterations, history):
    """One problem by torch's own optimiser: its best loss and how often it evaluated."""
    x = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [x], 1, iterations, 10 * iterations, 1e-30, 1e-30, history, line_search_fn="strong_wolfe"
    )
    losses = []

    def closure():
        loss, x.grad = (v[0] for v in function(x.detach()[None], torch.zeros(1, dtype=torch.long)))
        losses.append(float(loss))
        return loss

    optimiser.step(closure)
    return x.detach(), losses


@pytest.mark.parametrize(("dimension", "history"), [(2, 10), (8, 3), (8, 100)])
def test_rosenbrock_takes_no_more_than_torch_does(dimension, history):
    start = torch.tensor([-1.2, 1.0] * (dimension // 2), dtype=torch.float64)
    objective = differentiated(rosenbrock)
    found = minimise(objective, start[None], LBFGS(500, history, solved=1e-16, stationary=0))
    x, losses = torch_lbfgs(objective, start, 500, history)
    torch.testing.assert_close(found.x[0], torch.ones_like(start), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.x[0], x, rtol=0, atol=1e-6)
    theirs = next(number for number, loss in enumerate(losses, 1) if loss <= 1e-16)
    assert int(found.evaluations) <= 1.2 * theirs
    assert bool(found.converged)


def test_the_first_steps_are_torchs():
    start = torch.tensor([-1.2, 1.0, -1.2, 1.0], dtype=torch.float64)
    for steps in range(1, 6):
        found = minimise(differentiated(rosenbrock), start[None], LBFGS(steps, stationary=0))
        x, _ = torch_lbfgs(differentiated(rosenbrock), start, steps, 100)
        torch.testing.assert_close(found.x[0], x, rtol=1e-9, atol=1e-12)


def test_quadratics_reach_their_closed_form():
    objective, solution = quadratics(6, 12)
    start = torch.randn(6, 12, generator=generator(1), dtype=torch.float64)
    found = minimise(objective, start, LBFGS(300, solved=1e-18))
    torch.testing.assert_close(found.x, solution, rtol=0, atol=1e-7)
    assert found.converged.all() and not (found.stalled | found.exhausted).any()


def test_a_dlg_image_is_found_as_torch_finds_it():
    model = lenet("uniform", (1, 8, 8))
    images, labels = victims(1, shape=(1, 8, 8))
    dummies = Dummies(observe(model, images, labels), None)
    matching = GradientMatching(dummies.observation, SquaredError, dtype=torch.float64)
    start = dummies.start(dummies.everyone, MID_GREY, 0, torch.float64)

    def objective(x, rows):  # scaled, because torch drops pairs with sᵀy below an absolute 1e-10
        return tuple(1e9 * value for value in dummies.evaluate(matching, x, rows))

    found = minimise(objective, start, LBFGS(110, 100, solved=1e-5))
    x, losses = torch_lbfgs(objective, start[0], 110, 100)
    theirs = next(number for number, loss in enumerate(losses, 1) if loss <= 1e-5)
    assert int(found.evaluations) <= 1.2 * theirs
    assert float((dummies.images(found.x) - images).abs().max()) < 1e-3
    assert float((dummies.images(x[None]) - images).abs().max()) < 1e-3


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, 20))
def test_a_problem_in_a_batch_ends_where_it_ends_alone(seed, history):
    start = torch.randn(4, 6, generator=generator(seed), dtype=torch.float64) * torch.tensor(
        [[0.1], [1], [2], [5]]
    )
    objective = differentiated(lambda x, rows: rosenbrock(x, rows) * (1 + rows))
    settings_ = LBFGS(40, history, solved=1e-12)
    together = minimise(objective, start, settings_)
    for row in range(4):

        def alone(x, rows, row=row):
            return objective(x, rows + row)

        single = minimise(alone, start[row : row + 1], settings_)
        torch.testing.assert_close(together.x[row : row + 1], single.x, rtol=1e-6, atol=1e-9)
        for flag in ("iterations", "evaluations", "converged", "stalled", "exhausted"):
            assert getattr(together, flag)[row] == getattr(single, flag)[0], flag


def test_only_problems_at_work_are_evaluated():
    objective, _ = quadratics(3, 8)
    start = torch.randn(3, 8, generator=generator(1), dtype=torch.float64) * torch.tensor([[1e-6], [1], [1e3]])
    asked = []

    def counting(x, rows):
        asked.append(rows.clone())
        return objective(x, rows)

    found = minimise(counting, start, LBFGS(300, solved=1e-12))
    counted = torch.bincount(torch.cat(asked), minlength=3)
    assert counted.tolist() == found.evaluations.tolist()
    assert len(set(counted.tolist())) == 3 and len(asked[-1]) == 1


def test_a_minimum_above_zero_is_converged_not_stalled():
    objective, solution = quadratics(2, 8, offset=3.0)
    found = minimise(objective, torch.zeros_like(solution), LBFGS(300))
    assert found.converged.all()
    torch.testing.assert_close(found.loss, torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_budget_that_ends_too_early_is_exhausted():
    found = minimise(differentiated(rosenbrock), torch.tensor([[-1.2, 1.0]]), LBFGS(12))
    assert found.exhausted.all() and not (found.stalled | found.converged).any()
    assert found.iterations.tolist() == [12]


def test_an_optimiser_without_a_way_down_is_stalled():
    def lying(x, rows):  # the gradient points uphill
        return x.square().sum(1) + 1, -2 * x

    found = minimise(lying, torch.ones(2, 3), LBFGS(50))
    assert found.stalled.all() and not (found.converged | found.exhausted).any()
    assert torch.equal(found.x, torch.ones(2, 3))


def test_nan_is_survived_and_the_best_point_kept():
    def cliff(x, rows):  # a bowl at 1.5, and nothing beyond 2
        loss = (x - 1.5).square().sum(1)
        return torch.where((x > 2).any(1), torch.nan, loss)

    found = minimise(differentiated(cliff), torch.tensor([[-30.0, 0.5]]), LBFGS(100, solved=1e-10))
    torch.testing.assert_close(found.x, torch.full((1, 2), 1.5), rtol=0, atol=1e-4)
    everywhere = minimise(differentiated(lambda x, rows: x.sum(1) * torch.nan), torch.ones(2, 3), LBFGS(10))
    assert torch.equal(everywhere.x, torch.ones(2, 3)) and everywhere.stalled.all()


def test_losses_fall_with_the_budget_and_their_scale_does_not_matter():
    start = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    losses = [float(minimise(differentiated(rosenbrock), start, LBFGS(n)).loss) for n in (1, 5, 20, 60)]
    assert losses == sorted(losses, reverse=True)
    for scale in (2.0**-40, 2.0**40):  # powers of two change no rounding
        scaled = minimise(differentiated(lambda x, rows, c=scale: c * rosenbrock(x, rows)), start, LBFGS(20))
        assert float(scaled.loss) / scale == pytest.approx(losses[2], rel=1e-12)


def test_precision_follows_the_start():
    for dtype in (torch.float32, torch.float64):
        found = minimise(differentiated(rosenbrock), torch.zeros(1, 2, dtype=dtype), LBFGS(60, solved=1e-9))
        assert found.x.dtype == found.loss.dtype == dtype
        assert found.converged.all()
