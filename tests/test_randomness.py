"""Streams seeded together are those seeded one by one by NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.randomness import TOGETHER, Purpose, numpy_stream, numpy_streams, torch_stream, torch_streams
from fedsim.seeding import Seeded, seed_words, split_words

WORDS = st.integers(0, 2**32 - 1)
COUNTERS = st.lists(st.one_of(st.integers(0, 100), st.integers(0, 2**70)), max_size=5)


@given(
    seeds=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(WORDS, min_size=n, max_size=n), min_size=1)),
    count=st.integers(1, 12),
)
def test_words_are_those_of_numpys_seed_sequence(seeds: list[list[int]], count: int) -> None:
    expected = [np.random.SeedSequence(words).generate_state(count) for words in seeds]
    assert np.array_equal(seed_words(np.array(seeds, np.uint32).T, count), expected)


@given(
    seed=st.integers(0, 2**70),
    counters=COUNTERS,
    last=st.one_of(
        st.lists(WORDS, max_size=TOGETHER - 1),
        st.lists(WORDS, min_size=TOGETHER, max_size=12),
        st.lists(st.integers(2**31, 2**33), min_size=TOGETHER, max_size=12),
    ),
)
def test_streams_seeded_together_are_those_seeded_alone(seed: int, counters: list[int], last: list[int]) -> None:
    together = numpy_streams(seed, Purpose.BATCHES, *counters, last=last)
    alone = [numpy_stream(seed, Purpose.BATCHES, *counters, item) for item in last]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.permutation(20), other.permutation(20))
        assert np.array_equal(one.bit_generator.random_raw(9), other.bit_generator.random_raw(9))
    for ours, theirs in zip(
        torch_streams(seed, Purpose.PROTECTION, *counters, last=last),
        [torch_stream(seed, Purpose.PROTECTION, *counters, item) for item in last],
        strict=True,
    ):
        assert ours.initial_seed() == theirs.initial_seed()


def test_what_is_no_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        split_words(-1)
    with pytest.raises(ValueError, match=r"2 words of 64 bits are there, not 4 of uint32"):
        Seeded(np.zeros(2, np.uint64)).generate_state(4)
