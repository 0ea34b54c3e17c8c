"""What attackers do who know the defense: each strategy turns what was seen into what is worth matching.

A strategy returns the observation with cleaner gradients, with `trust` in its entries, or both, and may have the
attack match by another distance, or transform the dummy's gradient as the defense does; then the attack goes on as
ever. Its result is judged against the private images under that same observation, distance and transformation.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.base import Attack, AttackSettings
from fedsim.attacks.distances import AbsoluteError, SliceError
from fedsim.attacks.estimates import mean_of_rounds, noise_std, noisy_slices
from fedsim.attacks.labels import one_hot
from fedsim.attacks.transformations import TRANSFORMATIONS
from fedsim.defenses.base import Defense, DefenseSettings
from fedsim.defenses.denoising import marchenko_pastur_denoise
from fedsim.errors import ConfigError
from fedsim.privacy.observation import Adversary, Knowledge, Observation

Strategy = Callable[[Observation, Knowledge, Attack], Observation]


def survivors(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Compare only the entries that are not exactly zero: what was pruned is known to be wrong."""
    return _trusting(observation, (observation.gradients != 0).to(observation.gradients))


def thresholds(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Compare what survived, and let a pruned entry count a little: its true value is known to be small.

    A pruned entry lies anywhere between ± the smallest survivor τ of its parameter: its variance is τ²/3 for a
    uniform draw, beside that of the survivors, which are exact up to a hundredth of τ.
    """
    gradients = observation.gradients
    trust = torch.empty_like(gradients)
    for part, weight in zip(
        gradients.split(observation.model.layout.sizes, 1),
        trust.split(observation.model.layout.sizes, 1),
        strict=True,
    ):
        weight.copy_(torch.where(part != 0, 1.0, PRUNED_TRUST))
    return _trusting(observation, trust)


PRUNED_TRUST = 3e-4
"""Squared share of τ to which survivors count as exact (1e-4), over the variance τ²/3 of a pruned entry."""


def muted(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Leave out every parameter that holds exact zeros: the observation itself betrays the defended layer."""
    trust = torch.ones_like(observation.gradients)
    sizes = observation.model.layout.sizes
    for part, weight in zip(observation.gradients.split(sizes, 1), trust.split(sizes, 1), strict=True):
        weight *= (part != 0).all(1, keepdim=True)
    if not bool(trust.any(1).all()):
        raise ConfigError("muted: every parameter holds zeros, so nothing would be left to match")
    return _trusting(observation, trust)


def slices(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Find the k noisy slices as those that the best-matching image leaves the largest residuals in.

    The image is searched with `SliceError`, which needs neither the slices nor the strength of the noise, but
    profits from the norm to which noisy slices were clipped, where that is public.
    """
    bounds = knowledge.public["slice_bounds"].tolist()
    norm = getattr(knowledge.defense, "clipping_norm", None) if knowledge.parameters == "public" else None
    error = partial(SliceError, bounds=tuple(bounds), clipping_norm=norm)
    found = attack.matching(error).reconstruct(observation)
    p = one_hot(found.labels, observation.model.classes, observation.weights)
    engine = Autodiff(observation.model, observation.weights, observation.local)
    gradients, _ = engine.gradients(found.images.to(p), p)
    widths = torch.tensor(bounds, device=gradients.device).diff()
    residuals = (gradients - observation.gradients).square()
    means = torch.stack([part.mean(1) for part in residuals.split(widths.tolist(), 1)], 1)
    return _without_slices(observation, noisy_slices(means, knowledge), knowledge)


def told_slices(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Leave out the slices that the oracle was told."""
    return _without_slices(observation, knowledge.secrets["selected"], knowledge)


def denoise(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Clean each gradient first, as the server cleans the aggregate: drop what noise alone would produce."""
    aspect = getattr(knowledge.defense, "aspect", 6.0)
    pairs = zip(observation.gradients, noise_std(observation, knowledge).flatten().tolist(), strict=True)
    cleaned = [marchenko_pastur_denoise(gradient, std, aspect) for gradient, std in pairs]
    return replace(observation, gradients=torch.stack(cleaned))


def average(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Average what each victim sent over all rounds at these weights: independent noise averages out."""
    return mean_of_rounds(observation)


def agreement(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Take each slice from two rounds that agree on it to the bit: neither has perturbed it; leave out the others.

    At constant weights a victim's gradient is the same every round, so a slice that was left alone twice shows. Of
    R rounds that leave a slice alone with probability 1 − k/n each, two or more do almost surely as R grows.
    """
    every = torch.cat([observation.gradients[:, None], knowledge.repeats], 1)
    widths = knowledge.public["slice_bounds"].diff().tolist()
    clean, trust = observation.gradients.clone(), torch.zeros_like(observation.gradients)
    for part, kept, weight in zip(
        every.split(widths, 2), clean.split(widths, 1), trust.split(widths, 1), strict=True
    ):
        same = (part[:, :, None] == part[:, None]).all(-1).sum(2) > 1
        found, first = same.max(1)
        kept.copy_(torch.where(found[:, None], part[torch.arange(len(part)), first], kept))
        weight.copy_(found[:, None].expand_as(weight))
    trust = torch.where(trust.any(1, keepdim=True), trust, torch.ones_like(trust))
    return replace(observation, gradients=clean, trust=trust)


def likelihood(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Trust each parameter by how far it stands above noise of strength σ: ‖t‖² − d·σ² over ‖t‖².

    Source: the Wiener filter's gain, one for each parameter.
    """
    variance = noise_std(observation, knowledge).square()
    sizes = observation.model.layout.sizes
    powers = [part.square().mean(1, keepdim=True) for part in observation.gradients.split(sizes, 1)]
    gains = [(1 - variance / power.clamp_min(torch.finfo(power.dtype).tiny)).clamp_min(0) for power in powers]
    trust = torch.cat([gain.expand(-1, size) for gain, size in zip(gains, sizes, strict=True)], 1)
    # Where nothing stands out, all that is left is to match everything.
    return _trusting(observation, torch.where(trust.any(1, keepdim=True), trust, torch.ones_like(trust)))


def laplace(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Leave what was seen as it is, and match all rounds by `AbsoluteError`: see `armed`."""
    return observation


def clipped(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Average the rounds, and clip the dummy's gradient as the defense does: see `transformed`."""
    return mean_of_rounds(observation)


def pruned(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Leave what was seen as it is, and prune the dummy's gradient as far as the zeros tell: see `transformed`."""
    return observation


def simulated(observation: Observation, knowledge: Knowledge, attack: Attack) -> Observation:
    """Leave what was seen as it is: the attack has learned on gradients that were protected alike."""
    return observation


REPEATED = frozenset({"average", "agreement", "simulated_average"})
"""Strategies that need several rounds at the same weights."""

REMATCHED = frozenset({"laplace"})
"""Strategies that match by a distance of their own, over all rounds."""

LOOK_BACK = REMATCHED | {"clipped"}
"""Strategies whose distance or transformation depends on what was sent in other rounds."""

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "survivors": survivors,
        "thresholds": thresholds,
        "muted": muted,
        "slices": slices,
        "told_slices": told_slices,
        "denoise": denoise,
        "average": average,
        "agreement": agreement,
        "likelihood": likelihood,
        "laplace": laplace,
        "clipped": clipped,
        "pruned": pruned,
        "simulated": simulated,
        "simulated_average": average,
    }
)


def strategies_of(
    defense: DefenseSettings, adversary: Adversary, repeats: int, attack: AttackSettings | None = None
) -> tuple[str, ...]:
    """Return the strategies that an adversary adds to those of the others who know less; "" is the plain attack.

    Whoever knows more can also do what the others do: tables show the best of all that an adversary can do.

    Args:
        defense: The scheme.
        adversary: What the attacker knows.
        repeats: Rounds at the same weights in which the attacker sees each victim.
        attack: The attack, which may have strategies of its own, against any defense that protects at all; one
            that learns through the defense can also be used as it is.
    """
    if adversary == "naive":
        return ("",)
    names = attack.own_strategies(adversary) if attack else None
    protects = type(defense.build()).protect is not Defense.protect
    if names is not None:
        names = names if protects else ()
    elif adversary == "oracle":
        names = defense.oracle_strategies()
    elif attack and attack.simulates_defense and protects:
        names = ("simulated", *defense.strategies())
    else:
        names = defense.strategies()
    return tuple(name for name in names if name not in REPEATED or repeats > 1)


def apply(name: str, observation: Observation, attack: Attack) -> Observation:
    """Return what a strategy makes of an observation; the plain attack's is left as it is."""
    if not name:
        return observation
    assert observation.knowledge
    return transformed(name, STRATEGIES[name](observation, observation.knowledge, attack))


def transformed(name: str, observation: Observation) -> Observation:
    """Return the observation with the transformation of the dummy that a strategy takes; most take none."""
    if name not in TRANSFORMATIONS:
        return observation
    return replace(observation, transformation=TRANSFORMATIONS[name](observation))


def armed(name: str, observation: Observation, attack: Attack) -> Attack:
    """Return the attack with the distance that a strategy matches by; most leave it as it is."""
    if name not in REMATCHED:
        return attack
    assert observation.knowledge
    return attack.matching(partial(AbsoluteError, repeats=observation.knowledge.repeats))


def _trusting(observation: Observation, trust: Tensor) -> Observation:
    return replace(observation, trust=trust)


def _without_slices(observation: Observation, selected: Tensor, knowledge: Knowledge) -> Observation:
    """Trust the slices that are not `selected` [N, n]; one that is all noise is matched as it is."""
    bounds = knowledge.public["slice_bounds"].to(observation.weights.device)
    trust = (~selected).to(observation.gradients).repeat_interleave(bounds.diff(), 1)
    if getattr(knowledge.defense, "variant", "corrected") == "published":
        # A published slice also perturbs the entry before it, or the very last one (trap 2).
        before = (bounds[1:-1] - 1) % trust.shape[1]
        for entry, noisy in zip(before.tolist(), selected[:, 1:].T, strict=True):
            trust[noisy, entry] = 0
    return _trusting(observation, torch.where(trust.any(1, keepdim=True), trust, torch.ones_like(trust)))
