import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.aggregation.pairwise import Block, PairwiseSum
from fedsim.aggregation.plain import PlainAggregation
from fedsim.engine.dealing import Dealer


def total(parts: list[tuple[Block, Tensor]]) -> Tensor:
    pairwise = PairwiseSum(PlainAggregation())
    for block, value in parts:
        pairwise.push(block, value)
    return pairwise.total()


def leaves(values: Tensor, first: int = 0) -> list[tuple[Block, Tensor]]:
    return [(Block(number, 1), value) for number, value in enumerate(values, first)]


def by_recursion(values: list[Tensor]) -> Tensor:
    """Independent reference: level by level, the way the tree is told."""
    while len(values) > 1:
        pairs = [values[at : at + 2] for at in range(0, len(values), 2)]
        values = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return values[0]


@given(count=st.integers(1, 150), seed=st.integers(0, 99))
def test_leaves_are_added_level_by_level(count: int, seed: int) -> None:
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(total(leaves(values)), by_recursion(list(values)))


@given(
    count=st.integers(1, 150),
    width=st.integers(1, 20),
    workers=st.lists(st.integers(1, 9), min_size=150, max_size=150),
)
def test_the_bits_do_not_depend_on_who_added_what(count: int, width: int, workers: list[int]) -> None:
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    dealer, parts = Dealer(count, width), []
    for number in workers:
        if block := dealer.next(number):
            own = dealer.numbers(block)
            parts.append((block, total(leaves(values[own.start : own.stop], own.start))))
    assert dealer.left == 0
    assert torch.equal(total(parts), total(leaves(values)))


@given(count=st.integers(1, 2000), seed=st.integers(0, 99))
def test_the_error_grows_with_the_depth_of_the_tree_only(count: int, seed: int) -> None:
    """Higham (1993), equation 4.6: at most γ(⌈log₂ n⌉) Σ|x|."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) + 1
    error = abs(total(leaves(values[:, None])).item() - values.double().sum().item())
    depth, unit = math.ceil(math.log2(count)), torch.finfo(torch.float32).eps / 2
    assert error <= depth * unit / (1 - depth * unit) * values.double().abs().sum().item()
