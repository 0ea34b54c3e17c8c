"""What a trial of a sweep reports: promised before it starts, and taken from its result."""

from collections.abc import Mapping
from typing import get_args

from fedsim.attacks.strategies import strategies_of
from fedsim.config import ExperimentConfig
from fedsim.privacy.observation import Adversary
from fedsim.results import SimulationResult, audit_stem

ROUND_METRICS = ("ACC", "loss", "test_loss", "seconds", "upload_bytes")
"""What a trial can report after every round; the others come with its end."""

Audited = tuple[str, str]
"""An audit: its adversary and its stem."""


def reported_metrics(config: ExperimentConfig) -> set[str]:
    """Return the names of what a trial of this experiment reports at its end."""
    names = {*ROUND_METRICS, "ART"}
    audits = _audits(config)
    for metric in ("PSNR", "SSIM"):
        names |= set(_strongest(metric, dict.fromkeys(audits, 0.0)))
    if config.overhead_pairs and config.defense.name != "none":
        names.add("ART_overhead")
    return names


def _audits(config: ExperimentConfig) -> list[Audited]:
    return [
        (adversary, audit_stem(attack.title, adversary, strategy, round_))
        for attack in config.attacks
        for adversary in config.audit.adversaries
        for strategy in strategies_of(config.defense, adversary, config.audit.observations, attack)
        for round_ in config.audit.rounds
    ]


def final_metrics(result: SimulationResult) -> dict[str, float]:
    """Return what a trial reports at its end.

    `<audit>.PSNR` is the mean of one audit, `<adversary>.PSNR` that of the strongest audit of attackers who know
    no more than this adversary, and `PSNR` that of the strongest of all; so with SSIM.
    """
    summary = result.summary
    metrics = {name: float(summary[name]) for name in ("ACC", "ART", "upload_bytes")}
    last = result.history[-1]
    metrics |= {name: float(last[name]) for name in ("loss", "test_loss", "seconds") if name in last}
    for metric in ("PSNR", "SSIM"):
        metrics |= _strongest(metric, {(one.adversary, one.stem): one.mean(metric) for one in result.audits})
    if summary["overhead"]:
        metrics["ART_overhead"] = float(summary["overhead"]["median"])
    return metrics


def _strongest(metric: str, means: Mapping[Audited, float]) -> dict[str, float]:
    """Return a metric by audit, by adversary, and over all."""
    if not means:
        return {}
    found = {f"{stem}.{metric}": mean for (_, stem), mean in means.items()}
    knowledge = get_args(Adversary)
    for adversary in {adversary for adversary, _ in means}:
        no_more = knowledge[: knowledge.index(adversary) + 1]
        found[f"{adversary}.{metric}"] = max(mean for (who, _), mean in means.items() if who in no_more)
    return found | {metric: max(means.values())}
