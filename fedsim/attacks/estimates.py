"""What an attacker who knows the scheme alone reads its parameters from: the observation, by closed forms."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.privacy.observation import Knowledge, Observation

GAUSSIAN_MEDIAN, LAPLACIAN_MEDIAN = 0.67449, math.log(2) / math.sqrt(2)
"""Median absolute value of the two noises, of standard deviation 1."""

ENOUGH = 256
"""Entries of a parameter whose median tells the noise to about a tenth."""


def noise_std(observation: Observation, knowledge: Knowledge) -> Tensor:
    """Return the standard deviation of the noise in one entry of what each victim sent, [N, 1], gradient units.

    Where the parameters are public it follows from them. If not, several rounds at the same weights differ by
    their noise alone, so that it is the deviation over rounds. Of one round it is the least median absolute value
    of any parameter with `ENOUGH` entries: right if noise is on every entry and hides one layer at least, too
    large if it hides none, and near zero if a layer was left alone.

    Source: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81, 1994 (median).
    """
    gradients, defense = observation.gradients, knowledge.defense
    if knowledge.parameters == "public":
        share = getattr(defense, "perturbed", 1) / getattr(defense, "slices", 1)
        return gradients.new_full((len(gradients), 1), getattr(defense, "sigma") * share**0.5)  # noqa: B009
    if knowledge.repeats.shape[1]:
        rounds = torch.cat([gradients[:, None], knowledge.repeats], 1)
        return rounds.var(1).mean(1, keepdim=True).sqrt()
    unit = LAPLACIAN_MEDIAN if getattr(defense, "name", "") == "dp_laplacian" else GAUSSIAN_MEDIAN
    parts = gradients.abs().split(observation.model.layout.sizes, 1)
    medians = [part.median(1).values for part in parts if part.shape[1] >= ENOUGH]
    return torch.stack(medians or [gradients.abs().median(1).values], 1).amin(1, keepdim=True) / unit


def noisy_slices(residuals: Tensor, knowledge: Knowledge) -> Tensor:
    """Return which slices hold noise, [N, n], bool: those with the largest of the mean squared residuals [N, n].

    Where k is public it is k of them. If not, they end at the widest gap, in decades, between neighbours in the
    order of the residuals: one slice at least is taken for noisy. Slices without entries (NaN) are clean.
    """
    ordered, order = residuals.nan_to_num(nan=-1.0).sort(1, descending=True)
    if knowledge.parameters == "public":
        count = torch.full_like(order[:, :1], getattr(knowledge.defense, "perturbed"))  # noqa: B009
    else:
        logs = ordered.clamp_min(torch.finfo(ordered.dtype).tiny).log()
        gaps = torch.where(ordered[:, 1:] >= 0, logs[:, :-1] - logs[:, 1:], -torch.inf)
        count = F.pad(gaps, (0, 1), value=-torch.inf).argmax(1, keepdim=True) + 1
    rank = torch.arange(order.shape[1], device=order.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, rank < count)


def mean_of_rounds(observation: Observation) -> Observation:
    """Return the observation with the mean of what each victim sent over all rounds at these weights."""
    assert observation.knowledge
    repeats = observation.knowledge.repeats
    total = observation.gradients + repeats.sum(1)
    return replace(observation, gradients=total / (1 + repeats.shape[1]))


def clipping_norm(observation: Observation, knowledge: Knowledge) -> Tensor:
    """Return the L2 norm to which what each victim sent was clipped, [N], gradient units.

    If it is not public, it is the length of the mean t of all R rounds, which `observation` must hold, without
    what noise adds to it: ‖t‖² − d·σ²/R. Where the gradients of single samples were clipped and disagree, their
    mean is shorter than the norm: then the scale of the dummy's gradient is wrong, but not its direction.

    Source: Li et al. (GGL), CVPR 2022 (the length of what was sent), without the correction.
    """
    gradients, rounds = observation.gradients, 1 + knowledge.repeats.shape[1]
    if knowledge.parameters == "public":
        return gradients.new_full((len(gradients),), getattr(knowledge.defense, "clipping_norm"))  # noqa: B009
    first = rounds * gradients - knowledge.repeats.sum(1)
    variance = noise_std(replace(observation, gradients=first), knowledge).square()[:, 0] / rounds
    power = gradients.square().sum(1)
    # Of what noise hides altogether, a hundredth of the length is left to go on with.
    return torch.maximum(power - gradients.shape[1] * variance, 1e-4 * power).sqrt()
