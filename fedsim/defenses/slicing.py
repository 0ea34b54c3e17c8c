"""Cut the flat gradient into n slices of equal leakage risk."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ConfigError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def equal_risk_bounds(risk: Floats, sizes: Sequence[int], slices: int) -> Integers:
    """Return the bounds of half-open slices that share the total risk equally, to within one entry's risk.

    A parameter's risk is spread evenly over its entries, so a slice may split a parameter; where there is no
    risk at all, the slices have equal size.

    Args:
        risk: Leakage risk of each parameter, shape [L], finite and not negative.
        sizes: Number of entries of each parameter, length L.
        slices: Number n of slices.

    Returns:
        n + 1 ascending positions from 0 to d; slice i is [bounds[i], bounds[i + 1]).

    Raises:
        ConfigError: If there are more slices than entries.

    Source:
        Wang et al., "Protect Privacy from Gradient Leakage Attack in Federated Learning", INFOCOM 2022
        (slicing); half-open, and splitting parameters, where the published code shares and repeats entries.
    """
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    if slices > offsets[-1]:
        raise ConfigError(f"defense.slices: {slices} slices of a model with {offsets[-1]} parameters")
    if not risk.any():
        risk = np.asarray(sizes, dtype=np.float64)
    risk = risk / risk.max()  # the smallest floating-point numbers do not divide well
    cumulative = np.concatenate([[0.0], np.cumsum(risk)])
    targets = cumulative[-1] * np.arange(1, slices) / slices
    layer = np.minimum(np.searchsorted(cumulative, targets, side="right") - 1, np.flatnonzero(risk)[-1])
    within = np.minimum((targets - cumulative[layer]) / risk[layer], 1.0)
    inner = np.rint(offsets[layer] + within * np.asarray(sizes)[layer])
    return np.concatenate([[0], inner, offsets[-1:]]).astype(np.int64)


def published_bounds(risk: Floats, sizes: Sequence[int], slices: int) -> Integers:
    """Return the bounds that the published code's greedy walk finds, as half-open positions.

    The walk goes over atoms (runs of gcd(sizes) entries) and closes a slice before the atom that would reach
    the average risk. An atom heavier than the average therefore closes slice after slice in front of it, and
    the last slice takes all that is left (trap 2 of the paper's code). The published slice i ≥ 1 moreover
    starts one entry early, on the last entry of its neighbour, or, where bounds[i] is 0, on the last entry of
    the whole gradient, by Python's negative index.

    Args:
        risk: Leakage risk of each parameter, shape [L].
        sizes: Number of entries of each parameter, length L.
        slices: Number n of slices.

    Returns:
        n + 1 positions from 0 to d that never descend.

    Source:
        The published code, `perturb.py`; its own list holds the last index of each slice, one less than here.
    """
    atom = math.gcd(*sizes)
    counts = [size // atom for size in sizes]
    atoms = np.repeat(risk / counts, counts)
    average = sum(risk.tolist()) / slices
    bounds, start = [0], 0
    for _ in range(slices - 1):
        # A running sum from `start`, not a difference of two from 0, so that ties round as in the walk.
        reached = np.flatnonzero(np.cumsum(atoms[start:]) >= average)
        if not reached.size:
            break
        start += int(reached[0])
        bounds.append(start * atom)
    # Rounding alone can use up the atoms early; the published code then raises, here the rest stays empty.
    bounds += [len(atoms) * atom] * (slices + 1 - len(bounds))
    return np.asarray(bounds, dtype=np.int64)


def joined_slices(bounds: Sequence[int], chosen: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the chosen ones of n slices as half-open stretches, neighbours joined to one.

    Args:
        bounds: n + 1 ascending positions.
        chosen: Which slices, length n.
    """
    stretches: list[tuple[int, int]] = []
    for start, stop, taken in zip(bounds[:-1], bounds[1:], chosen, strict=True):
        if taken and stretches and stretches[-1][1] == start:
            stretches[-1] = (stretches[-1][0], stop)
        elif taken:
            stretches.append((start, stop))
    return stretches
