from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.dealing import MOST, Dealer, split_evenly


def deal(count: int, width: int, workers: int, most: int = MOST) -> list[list[int]]:
    dealer, dealt = Dealer(count, width, most), []
    while block := dealer.next(workers):
        assert block.start % block.size == 0
        dealt.append(list(dealer.numbers(block)))
    return dealt


@given(st.integers(0, 3000), st.integers(1, 20), st.integers(1, 40))
def test_every_chunk_is_dealt_once_and_in_order(count: int, width: int, workers: int) -> None:
    assert sum(deal(count, width, workers), []) == list(range(count))


def test_a_small_round_takes_few_calls_and_a_larger_one_ends_in_small_blocks() -> None:
    assert [len(block) for block in deal(10, 1, 2)] == [4, 4, 1, 1]
    assert [len(block) for block in deal(34, 3, 2)] == [8, 8, 4, 4, 4, 4, 1, 1]
    assert [len(block) for block in deal(8, 16, 4)] == [1] * 8


@given(st.integers(1, 3000), st.integers(1, 20), st.integers(1, 40))
def test_no_worker_gets_more_than_an_even_share_at_once(count: int, width: int, workers: int) -> None:
    left = count
    for block in deal(count, width, workers):
        assert len(block) <= max(1, min(MOST, count // workers))
        left -= len(block)
    assert left == 0


@given(st.integers(1, 3000), st.integers(1, 40))
def test_chunks_are_even_and_no_wider_than_asked(clients: int, width: int) -> None:
    chunks = split_evenly(tuple(range(clients)), width)
    assert sum(chunks, ()) == tuple(range(clients))
    sizes = {len(chunk) for chunk in chunks}
    assert max(sizes) <= width and max(sizes) - min(sizes) <= 1


@given(st.integers(8, 3000), st.integers(2, 16), st.sampled_from([2, 4, 8]))
def test_blocks_of_one_turn_are_even(clients: int, width: int, workers: int) -> None:
    chunks = split_evenly(tuple(range(clients)), width)
    dealer = Dealer(len(chunks), width)
    while blocks := [block for _ in range(workers) if (block := dealer.next(workers))]:
        sizes = [sum(len(chunks[number]) for number in dealer.numbers(block)) for block in blocks]
        assert max(sizes) - min(sizes) <= 1 or len(blocks) < workers or len(chunks) & (len(chunks) - 1)


def test_most_is_a_limit() -> None:
    assert {len(block) for block in deal(100, 1, 2, most=1)} == {1}
