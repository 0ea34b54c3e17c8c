"""The audit: whom the server attacks, and how close the reconstructions come.

Ground truth stays here: an attack gets an `Observation` and nothing else.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.config import ExperimentConfig
from fedsim.data.partitions import Partition
from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore, Indices
from fedsim.privacy import metrics
from fedsim.privacy.observation import Reconstruction, Victim
from fedsim.randomness import Purpose, numpy_stream


@dataclass(frozen=True)
class AuditRow:
    """One private image and how well one attack reconstructed it.

    Attributes:
        attack: Label of the attack.
        adversary: What the attacker knew of the defense.
        strategy: What it made of that; "" is the plain attack.
        round: Round before which the victim was attacked.
        victim: Number of the victim in the audit.
        client: The victim's client number.
        image: Index of the image in the victim's batch.
        label: The image's class.
        PSNR: In dB, at most 100.
        SSIM: −1 … 1.
        capped: The true PSNR is above 100 dB.
        loss: Matching loss that the attack reached; None in files if it was not finite.
        loss_at_truth: Its loss at the private images; None for an attack without a matching loss.
        iterations: Optimiser steps of the restart that counted.
        stalled: The optimiser ended above the loss of the truth and gained no more: it failed by itself.
        exhausted: It ended above the loss of the truth, still gaining, when its budget ran out.
        seconds: Worker time an image.
        learned: A line on what the attack had learned before; "" if nothing.
    """

    attack: str
    adversary: str
    strategy: str
    round: int
    victim: int
    client: int
    image: int
    label: int
    PSNR: float
    SSIM: float
    capped: bool
    loss: float | None
    loss_at_truth: float | None
    iterations: int
    stalled: bool
    exhausted: bool
    seconds: float
    learned: str = ""


def choose_victims(config: ExperimentConfig, partition: Partition, round_: int) -> tuple[Victim, ...]:
    """Draw the probe victims of a round: the same for every defense and attack of one seed.

    Raises:
        ConfigError: If no client holds `audit.batch_size` images.
    """
    audit = config.audit
    sizes = np.diff(partition.offsets)
    able = np.flatnonzero(sizes >= audit.batch_size)
    if len(able) == 0:
        raise ConfigError(f"audit.batch_size: no client holds {audit.batch_size} images (most: {sizes.max()})")
    order = numpy_stream(config.seed, Purpose.VICTIMS, round_).permutation(able)
    victims = []
    for number in range(audit.victims):
        client = int(order[number % len(order)])
        draw = numpy_stream(config.seed, Purpose.VICTIMS, round_, number)
        images = draw.choice(partition.client(client), audit.batch_size, replace=False)
        victims.append(Victim(client, np.sort(images), stream=number))
    return tuple(victims)


def attack_seeds(config: ExperimentConfig, round_: int, victims: int) -> tuple[int, ...]:
    """Return one seed a victim for the attacks' own draws; defenses and attacks share them."""
    draws = (numpy_stream(config.seed, Purpose.ATTACK, round_, v) for v in range(victims))
    return tuple(int(draw.integers(2**62)) for draw in draws)


@dataclass(frozen=True)
class GroundTruth:
    """The victims' private images [N, B, C, H, W] in [0, 1] and labels [N, B]."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, data: ImageStore, victims: Sequence[Victim]) -> "GroundTruth":
        """Look the victims' images up."""
        indices: Indices = np.stack([victim.images for victim in victims])
        return cls(*data.take(indices))


SOLVED = 1e-6
"""An attack whose loss, relative to that of a gradient of zero, is below this has matched what it saw."""
SLACK = 1.001
"""Share by which rounding may lift a loss above that of the truth."""


@dataclass(frozen=True)
class Soundness:
    """Whether the attack on each victim was good enough to tell something about the defense, each [N], bool.

    An attack that ended above the loss of the private images themselves did not even find the best point that
    is known: its failure says nothing about the defense. One that ended at or below was misled by the defense, or
    was right. Without a loss at the truth, the attack's own word counts.
    """

    stalled: Tensor
    exhausted: Tensor

    @classmethod
    def of(cls, found: Reconstruction, loss_at_truth: Tensor | None) -> "Soundness":
        """Judge what an attack returned."""
        if loss_at_truth is None:
            return cls(found.stalled, found.exhausted)
        failed = found.loss > torch.clamp(loss_at_truth * SLACK, min=SOLVED)
        return cls(failed & ~found.exhausted, failed & found.exhausted)


def score(
    truth: GroundTruth,
    found: Reconstruction,
    loss_at_truth: Tensor | None,
    victims: Sequence[Victim],
    attack: str,
    adversary: str,
    strategy: str,
    round_: int,
    learned: str = "",
) -> list[AuditRow]:
    """Score what an attack returned: one row an image."""
    scores = metrics.score(truth.images, found.images)
    seconds = found.seconds / max(1, len(scores))
    sound = Soundness.of(found, loss_at_truth)
    return [
        AuditRow(
            attack=attack,
            adversary=adversary,
            strategy=strategy,
            round=round_,
            victim=row.victim,
            client=victims[row.victim].client,
            image=row.image,
            label=int(truth.labels[row.victim, row.image]),
            PSNR=row.PSNR,
            SSIM=row.SSIM,
            capped=row.capped,
            loss=float(found.loss[row.victim]),
            loss_at_truth=None if loss_at_truth is None else float(loss_at_truth[row.victim]),
            iterations=int(found.iterations[row.victim]),
            stalled=bool(sound.stalled[row.victim]),
            exhausted=bool(sound.exhausted[row.victim]),
            seconds=seconds,
            learned=learned,
        )
        for row in scores
    ]


def floor_scores(truth: GroundTruth, mean_image: NDArray[np.float32], seed: int) -> dict[str, dict[str, float]]:
    """Return mean PSNR and SSIM of guesses that know nothing of the victims, by guess."""
    guesses = metrics.floors(truth.images, torch.from_numpy(mean_image), seed)
    return {
        name: {
            "PSNR": float(np.mean([row.PSNR for row in rows])),
            "SSIM": float(np.mean([row.SSIM for row in rows])),
        }
        for name, rows in guesses.items()
    }


def as_bytes(images: Tensor) -> NDArray[np.uint8]:
    """Clamp images to [0, 1] and return them as bytes, for pictures."""
    finite = torch.nan_to_num(images.detach().cpu(), nan=0.5).clamp(0, 1)
    return (finite * 255).round().to(torch.uint8).numpy()


def rows_as_dicts(rows: Sequence[AuditRow]) -> list[dict[str, object]]:
    """Return the rows as plain data."""
    return [asdict(row) for row in rows]
