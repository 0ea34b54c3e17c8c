import pytest
import torch
from torch import Tensor

from fedsim.engine.acceptance import as_rows, judge
from fedsim.errors import RunError

NAN, INF = float("nan"), float("inf")


def test_a_sound_matrix_passes_as_it_is() -> None:
    updates, statistics = torch.arange(6.0).reshape(2, 3), torch.ones(2, 1)
    sent = judge(updates, statistics, 3)
    assert torch.equal(sent.rows, torch.cat([updates, statistics], dim=1))
    assert sent.mask.tolist() == [True, True] and not sent.reasons


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_rejected_in_updates_and_statistics(bad: float) -> None:
    updates, statistics = torch.ones(3, 2), torch.ones(3, 1)
    updates[0, 1], statistics[2, 0] = bad, bad
    sent = judge(updates, statistics, 2)
    assert sent.reasons == {0: "not finite", 2: "not finite"}
    assert sent.mask.tolist() == [False, True, False]
    assert sent.rows.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_finite_numbers_whose_sum_is_not_are_accepted() -> None:
    updates = torch.full((2, 3), 3e38)
    sent = judge(updates, torch.zeros(2, 0), 3)
    assert sent.mask.tolist() == [True, True] and not sent.reasons
    assert torch.equal(sent.rows, updates)


def test_one_client_of_another_size_is_told_from_the_rest() -> None:
    sent = judge([torch.ones(2), torch.ones(3), torch.tensor([1.0, NAN])], torch.zeros(3, 0), 2)
    assert sent.reasons == {1: "shape [3] instead of [2]", 2: "not finite"}
    assert sent.rows.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_a_matrix_of_another_width_is_wrong_for_all() -> None:
    rows, reasons = as_rows(torch.ones(2, 5), torch.zeros(2, 0), 4)
    assert set(reasons) == {0, 1} and rows.shape == (2, 4) and not rows.any()


@pytest.mark.parametrize("sent", [torch.ones(3, 4), [torch.ones(4)]])
def test_updates_that_belong_to_nobody_end_the_run(sent: Tensor | list[Tensor]) -> None:
    with pytest.raises(RunError, match=f"protect returned {len(sent)} updates for 2 clients"):
        as_rows(sent, torch.zeros(2, 0), 4)
