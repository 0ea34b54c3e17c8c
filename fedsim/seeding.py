"""NumPy's `SeedSequence` for many seeds at once: the same words, in a fraction of the time a seed.

A round seeds a stream or two for each client. One by one they take 15 µs each, of 13 clients together 9 and of 128
five (`python -m benchmarks.streams`); a GPU trains one of 128 clients in 16 (docs/engine.md).

Source: O'Neill, "Developing a seed_seq alternative", 2015; the constants and their order are those of NumPy, which
promises not to change what a seed gives (NEP 19; `numpy.random.SeedSequence`).
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

Words = NDArray[np.uint32]

POOL = 4
"""Words of state that everything is mixed into."""
SHIFT = np.uint32(16)
LEFT, RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
INTO, OUT_OF = (0x43B0D7E5, 0x931E8875), (0x8B51F9DD, 0x58F38DED)
"""First constant and factor of the hashes by which entropy gets into the pool, and words out of it."""


def split_words(number: int) -> list[int]:
    """Return a non-negative integer as 32-bit words, the lowest first; 0 is one word.

    Raises:
        ValueError: If it is negative.
    """
    if number < 0:
        raise ValueError(f"a seed must not be negative, got {number}")
    words = [number & 0xFFFFFFFF]
    return words if number < 2**32 else words + split_words(number >> 32)


def seed_words(entropy: Words, count: int) -> Words:
    """Return what `SeedSequence(words).generate_state(count)` gives for each column of `entropy`.

    Args:
        entropy: The words of K seeds, shape [n, K].
        count: Words wanted a seed.

    Returns:
        Shape [K, count].
    """
    given, seeds = entropy.shape
    size = max(POOL, given)
    padded = np.zeros((size, seeds), np.uint32)
    padded[:given] = entropy
    constants = _constants(*INTO, POOL * size)
    pool, used = _hashed(padded[:POOL], constants[: POOL + 1]), POOL
    for source in range(size):
        targets = [target for target in range(POOL) if target != source]
        value = pool[source] if source < POOL else padded[source]
        hashed = _hashed(value, constants[used : used + len(targets) + 1])
        mixed = LEFT * pool[targets] - RIGHT * hashed
        pool[targets] = mixed ^ (mixed >> SHIFT)
        used += len(targets)
    return _hashed(pool[np.arange(count) % POOL], _constants(*OUT_OF, count)).T


@cache
def _constants(first: int, factor: int, count: int) -> Words:
    values = [first]
    for _ in range(count):
        values.append(values[-1] * factor % 2**32)
    return np.array(values, np.uint32)[:, None]


def _hashed(values: Words, constants: Words) -> Words:
    """Hash row i of `values` by constants i and i + 1; a single row by all of them."""
    hashed: Words = (values ^ constants[:-1]) * constants[1:]
    return hashed ^ (hashed >> SHIFT)


class Seeded(ISeedSequence):
    """A seed whose words are there already, for one of NumPy's bit generators."""

    def __init__(self, words: NDArray[np.uint64]) -> None:
        """Take the words that the bit generator will ask for."""
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[np.uint64]:
        """Return them.

        Raises:
            ValueError: If others are asked for.
        """
        if n_words != len(self._words) or np.dtype(dtype) != np.uint64:
            raise ValueError(f"{len(self._words)} words of 64 bits are there, not {n_words} of {np.dtype(dtype)}")
        return self._words
