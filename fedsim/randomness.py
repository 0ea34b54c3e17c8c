"""Counter-based randomness: every draw is a function of (seed, purpose, round, client).

Nothing here depends on which process draws, in which order, or how often, which is what makes a run the
same for any number of workers, through retries and through a resume.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.seeding import Seeded, seed_words, split_words

TOGETHER = 7
"""Seeds from which on it is faster to make them together (`benchmarks/streams.py`)."""


class Purpose(IntEnum):
    """What a stream of random numbers is for; the values are part of the result, so never reuse one."""

    INITIAL_WEIGHTS = 1
    PARTITION = 2
    COHORT = 3
    BATCHES = 4
    PROTECTION = 5
    PREPARATION = 6
    VICTIMS = 7
    PROBE_PROTECTION = 8
    ATTACK = 9
    ROOT_SET = 10
    DATA_SPLIT = 11
    OVERHEAD = 12
    PROBE_REPEATS = 13
    DROPOUT = 14
    DELAYS = 15
    LEARNING = 16


def _sequence(seed: int, purpose: Purpose, *counters: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, int(purpose), *counters))


def numpy_stream(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """Return the NumPy generator of one purpose; `counters` is usually (round, client)."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, *counters)))


def torch_stream(
    seed: int, purpose: Purpose, *counters: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the PyTorch generator of one purpose on `device`; `counters` is usually (round, client)."""
    return _generator(_sequence(seed, purpose, *counters).generate_state(1, np.uint64)[0], device)


def _generator(word: np.uint64, device: torch.device | str) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.manual_seed(int(word >> np.uint64(1)))
    return generator


def numpy_streams(seed: int, purpose: Purpose, *counters: int, last: Sequence[int]) -> list[np.random.Generator]:
    """Return `numpy_stream(seed, purpose, *counters, item)` for each item of `last`."""
    if not _together(last):
        return [numpy_stream(seed, purpose, *counters, item) for item in last]
    words = _words(seed, purpose, counters, last, 2)
    return [np.random.Generator(np.random.Philox(Seeded(row))) for row in words]  # type: ignore[arg-type]


def torch_streams(
    seed: int, purpose: Purpose, *counters: int, last: Sequence[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """Return `torch_stream(seed, purpose, *counters, item)` for each item of `last`."""
    if not _together(last):
        return [torch_stream(seed, purpose, *counters, item, device=device) for item in last]
    return [_generator(word, device) for (word,) in _words(seed, purpose, counters, last, 1)]


def _together(last: Sequence[int]) -> bool:
    return len(last) >= TOGETHER and max(last) < 2**32


def _words(
    seed: int, purpose: Purpose, counters: Sequence[int], last: Sequence[int], count: int
) -> NDArray[np.uint64]:
    """Return `count` words of 64 bits for each item of `last`, shape [K, count]."""
    first = [word for number in (seed, int(purpose), *counters) for word in split_words(number)]
    entropy = np.empty((len(first) + 1, len(last)), np.uint32)
    entropy[:-1] = np.array(first, np.uint32)[:, None]
    entropy[-1] = last
    return seed_words(entropy, 2 * count).astype("<u4", order="C").view("<u8").astype(np.uint64)
