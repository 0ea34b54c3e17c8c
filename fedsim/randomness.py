"""Counter-based randomness: every draw is a function of (seed, purpose, round, client).

Nothing here depends on which process draws, in which order, or how often, which is what makes a run the
same for any number of workers, through retries and through a resume.
"""

from enum import IntEnum

import numpy as np
import torch


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
    generator = torch.Generator(device=device)
    state = _sequence(seed, purpose, *counters).generate_state(1, np.uint64)[0]
    generator.manual_seed(int(state >> np.uint64(1)))
    return generator
