"""An attack on a payload of the user's own: weights and a gradient from files, no federation and no Ray.

`check_payload` reads and checks everything; `attack_payload` attacks and scores. The truth, where the user gives
it, is used for scores alone: the attack gets an `Observation` like any other.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fedsim import environment
from fedsim.attacks.base import Attack
from fedsim.attacks.learning import LearningContext
from fedsim.data.public import load_public
from fedsim.errors import ConfigError
from fedsim.learning import batch_norm
from fedsim.learning.batches import ImageStore
from fedsim.learning.models import Model, build_model
from fedsim.payload_config import InputScale, PayloadAttackConfig
from fedsim.privacy import audit, metrics
from fedsim.privacy.observation import LocalTraining, Observation, Reconstruction
from fedsim.privacy.payload_files import (
    PayloadFile,
    align,
    batch_statistics,
    read_payload,
    read_tensors,
    truth_images,
)
from fedsim.randomness import Purpose, numpy_stream


@dataclass(frozen=True)
class CheckedPayload:
    """A payload that fits its model, and the attack on it.

    Attributes:
        config: What is known of it.
        attack: The attack.
        observation: What the attack gets.
        truth: The private images [1, B, C, H, W] and labels [1, B], for scoring; None if they were not given.
        fingerprint: SHA-256 of the files' tensors, in hexadecimal.
        public: What an attack that learns learns from; None for the others.
    """

    config: PayloadAttackConfig
    attack: Attack
    observation: Observation
    truth: audit.GroundTruth | None
    fingerprint: str
    public: ImageStore | None = None

    def describe(self) -> str:
        """Return one line that says what is about to be attacked."""
        seen = self.observation
        known = "known" if seen.labels is not None else "not known"
        rate = "; learning rate not known" if seen.local.learning_rate is None else ""
        return (
            f"{self.config.attack.title} on {seen.batch_size} image(s) of {list(seen.model.shape)} behind "
            f"{seen.gradients.shape[1]:,} parameters of {self.config.model.name}; labels {known}{rate}; "
            f"truth {'given' if self.truth else 'not given'}"
        )


def check_payload(
    config: PayloadAttackConfig, path: Path, after: Path | None = None, truth: Path | None = None
) -> CheckedPayload:
    """Read a payload and check it against what is said of it; nothing is attacked yet.

    Args:
        config: What is known.
        path: The payload, or with `after` the weights of a round.
        after: The weights one round later.
        truth: A file with the private images (and labels); by default those in the payload, if any.

    Raises:
        ConfigError: If anything does not fit.
    """
    payload = read_payload(path, after)
    model = build_model(config.model, config.shape, config.classes, config.seed)
    observation = _observe(config, payload, model)
    attack = config.attack.build()
    config.attack.check(model, observation.batch_size)
    if observation.local.learning_rate is None:
        config.attack.check_unknown_rate()
    if config.attack.knows_labels and observation.labels is None:
        raise ConfigError(
            f"labels: {config.attack.name} assumes that they are known, but neither settings nor {path} give them"
        )
    if not config.attack.knows_labels:
        observation = replace(observation, labels=None)
    given = _truth(config, payload, observation.batch_size, truth)
    digest = hashlib.sha256()
    for name, entries in sorted(payload.sections.items()):
        for key, value in sorted(entries.items()):
            digest.update(f"{name}.{key}".encode() + value.contiguous().numpy().tobytes())
    public = _public(config, given)
    if public is not None:
        config.attack.check_public(len(public.labels), observation.batch_size)
    return CheckedPayload(config, attack, observation, given, digest.hexdigest(), public)


def _public(config: PayloadAttackConfig, truth: audit.GroundTruth | None) -> ImageStore | None:
    """Load the images that the attack learns from, without those that are among the true ones."""
    source = config.attack.public_source
    if source is None:
        return None
    if source == "test":
        raise ConfigError(
            f"attack.public: a payload has no test images; name a data set for {config.attack.name} to learn from"
        )
    images, labels = load_public(source, config.shape, config.classes)
    if truth is not None:
        private = {image.tobytes() for image in audit.as_bytes(truth.images.flatten(0, 1))}
        free = np.array([image.tobytes() not in private for image in images], dtype=bool)
        images, labels = images[free], labels[free]
    return ImageStore.of(images, labels)


def _observe(config: PayloadAttackConfig, payload: PayloadFile, model: Model) -> Observation:
    weights = align(payload.section("weights"), model, f"{payload.path}: the weights")
    sent = align(payload.section(payload.kind), model, f"{payload.path}: the entries of {payload.kind}")
    labels = _labels(config, payload)
    size = _batch_size(config, payload, labels)
    if config.batch_norm == "eval" and model.has_batch_norm:
        if weights.averages is None:
            raise ConfigError(f"{payload.path}: batch_norm: eval needs batch norm's averages among the weights")
        model.module.eval()
    if weights.averages is not None:
        batch_norm.load_averages(model.module, weights.averages)
    statistics = weights.parameters.new_zeros(0)
    if payload.section("statistics"):
        statistics = _statistics(payload, model)
    elif weights.averages is not None and sent.averages is not None and config.batch_norm == "train":
        statistics = batch_statistics(weights.averages, sent.averages, model, size, config.momentum)
    rated = payload.kind != "gradient" or config.local_steps > 1
    scale = InputScale(config)
    if not scale.is_identity:
        model.module.register_forward_pre_hook(scale)
    return Observation(
        model=model,
        weights=weights.parameters,
        gradients=_gradient(config, payload.kind, weights.parameters, sent.parameters)[None],
        batch_size=size,
        statistics=statistics[None],
        labels=None if labels is None else labels[None],
        seeds=(int(numpy_stream(config.seed, Purpose.ATTACK).integers(2**62)),),
        local=LocalTraining(config.local_steps, config.learning_rate if rated else 1.0),
    )


def _gradient(config: PayloadAttackConfig, kind: str, weights: Tensor, sent: Tensor) -> Tensor:
    """Return what was sent in gradient units, [d]; an update at an unknown rate as it is."""
    if kind == "gradient":
        if config.local_steps > 1 and config.learning_rate is None:
            raise ConfigError(
                "learning_rate: several local steps behind a gradient cannot be simulated without it"
            )
        return sent
    displacement = weights - sent if kind == "after" else -sent
    if not displacement.any():
        raise ConfigError("the payload holds no update: nothing has changed between the weights")
    return displacement / (config.learning_rate or 1.0)


def _statistics(payload: PayloadFile, model: Model) -> Tensor:
    sent = payload.section("statistics")
    expected = len(batch_norm.averages(model.module))
    whole = sent[""] if list(sent) == [""] else torch.cat([value.flatten() for value in sent.values()])
    if whole.numel() != expected:
        raise ConfigError(f"{payload.path}: statistics hold {whole.numel()} values, the model has {expected}")
    return whole.flatten().float()


def _labels(config: PayloadAttackConfig, payload: PayloadFile) -> Tensor | None:
    stored = payload.value("labels")
    if config.labels is None and stored is None:
        return None
    labels = torch.tensor(config.labels) if config.labels is not None else stored
    assert labels is not None
    labels = labels.reshape(-1).long()
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= config.classes:
        raise ConfigError(f"labels: {labels.tolist()} are not all classes between 0 and {config.classes - 1}")
    return labels


def _batch_size(config: PayloadAttackConfig, payload: PayloadFile, labels: Tensor | None) -> int:
    stated = payload.value("batch_size")
    said = None if stated is None else int(stated)
    if said is not None and said < 1:
        raise ConfigError(f"{payload.path}: batch_size is {said}")
    size = config.batch_size or said or (1 if labels is None else len(labels))
    if said is not None and size != said:
        raise ConfigError(f"batch_size: {size} images, but the payload says {said}")
    if labels is not None and len(labels) != size:
        raise ConfigError(f"labels: {len(labels)} labels for a batch of {size}")
    if size % config.local_steps:
        raise ConfigError(
            f"local_steps: {size} images cannot be shared evenly by {config.local_steps} local steps"
        )
    return size


def _truth(
    config: PayloadAttackConfig, payload: PayloadFile, size: int, path: Path | None
) -> audit.GroundTruth | None:
    source, images, labels = payload.path, payload.value("images"), _labels(config, payload)
    if path is not None:
        entries = read_tensors(path)
        if "images" not in entries:
            raise ConfigError(f"{path}: holds no images")
        source, images = path, entries["images"]
        labels = entries["labels"].reshape(-1).long() if "labels" in entries else labels
    if images is None:
        return None
    pixels = truth_images(images, config.shape, *config.range, what=str(source))
    if len(pixels) != size:
        raise ConfigError(f"{source}: {len(pixels)} true images for a batch of {size}")
    if labels is None:
        labels = torch.full((size,), -1)
    if len(labels) != size:
        raise ConfigError(f"{source}: {len(labels)} true labels for a batch of {size}")
    return audit.GroundTruth(pixels[None], labels[None])


@dataclass(frozen=True)
class PayloadResult:
    """What an attack on a payload found: the reconstruction, one row an image, and a line on what it learned."""

    found: Reconstruction
    images: pd.DataFrame
    learned: str = ""

    def summary(self, checked: CheckedPayload) -> dict[str, Any]:
        """Return what `result.json` holds."""
        return {
            "attack": checked.config.attack.title,
            "images": self.images.to_dict(orient="records"),
            "seconds": self.found.seconds,
            **({"learned": self.learned} if self.learned else {}),
            "payload_sha256": checked.fingerprint,
            "versions": environment.versions(),
            "hardware": environment.hardware(),
            "config": checked.config.model_dump(mode="json"),
        }


def attack_payload(checked: CheckedPayload) -> PayloadResult:
    """Attack a checked payload; score the outcome if the truth is known."""
    attack, seen, report = checked.attack, checked.observation, ""
    if checked.public is not None:
        seed = int(numpy_stream(checked.config.seed, Purpose.LEARNING).integers(2**62))
        context = LearningContext(
            seen.model, seen.weights, checked.public, seen.batch_size, seed=seed, local=seen.local
        )
        learned = attack.learn(context)
        report, attack = attack.report(learned), attack.taught(learned)
    found = attack.reconstruct(seen).cpu()
    return PayloadResult(found, pd.DataFrame(_rows(checked, attack, found)), report)


def _rows(checked: CheckedPayload, attack: Attack, found: Reconstruction) -> list[dict[str, Any]]:
    truth, observation = checked.truth, checked.observation
    at_truth = None
    if truth is not None and int(truth.labels.min()) >= 0:
        at_truth = attack.matching_loss(observation, truth.images, truth.labels)
    sound = audit.Soundness.of(found, at_truth)
    rate = {} if found.learning_rates is None else {"learning_rate": float(found.learning_rates[0])}
    common = rate | {
        "loss": float(found.loss[0]),
        "loss_at_truth": None if at_truth is None else float(at_truth[0]),
        "iterations": int(found.iterations[0]),
        "stalled": bool(sound.stalled[0]),
        "exhausted": bool(sound.exhausted[0]),
    }
    labels = found.labels[0].tolist()
    if truth is None:
        return [{"image": image, "recovered_label": label, **common} for image, label in enumerate(labels)]
    scores = metrics.score(truth.images, found.images)
    return [
        {
            "image": s.image,
            "matched": s.matched,
            "recovered_label": labels[s.matched],
            "PSNR": s.PSNR,
            "SSIM": s.SSIM,
        }
        | common
        for s in scores
    ]
