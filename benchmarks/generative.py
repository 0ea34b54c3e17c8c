"""Where a generative prior helps: gradients with more and more noise, with and without it; prints JSON lines.

.venv/bin/python -m benchmarks.generative --data-dir DIR

Gaussian noise on every entry of gradients of single training images, which the attacker does not know of; LeNet,
PyTorch's initialisation; the generator learns from the test images. Beside the attacks: the mean public image, and
the mean of those with the victim's label, which is what knowing the label alone is worth.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.attacks.generative import GenerativeConfig
from fedsim.attacks.generator import Trained
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.learning import LearningContext
from fedsim.data.datasets import CIFAR10Config, Dataset, FashionMNISTConfig, MNISTConfig, load_dataset
from fedsim.data.public import public_images
from fedsim.learning.batches import ImageStore
from fedsim.learning.models import LeNetConfig, build_model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Observation

DATASETS = {"mnist": MNISTConfig, "fashion_mnist": FashionMNISTConfig, "cifar10": CIFAR10Config}


def observed(dataset: Dataset, victims: int) -> tuple[Tensor, Tensor, LearningContext]:
    """Training images [N, 1, C, H, W], their labels [N, 1], and what an attack learns from."""
    model = build_model(LeNetConfig(), dataset.shape, dataset.classes, seed=0)
    order = np.random.default_rng(0).permutation(len(dataset.train_labels))[:victims]
    held = ImageStore.of(dataset.train_images[order], dataset.train_labels[order])
    images, labels = held.take(np.arange(victims)[:, None])
    public = public_images("test", dataset)
    store = ImageStore.of(public.images, public.labels)
    return images, labels, LearningContext(model, model.initial_weights(), store, 1, seed=0)


def clean_observation(context: LearningContext, images: Tensor, labels: Tensor) -> Observation:
    """What the server sees of the victims without noise."""
    bytes_ = (images[:, 0] * 255).round().to(torch.uint8)
    seen = replace(context, public=ImageStore(bytes_, labels[:, 0]))
    gradients = torch.cat([part for _, part in seen.pieces(torch.arange(len(labels))[:, None])])
    empty, seeds = gradients.new_zeros(len(labels), 0), tuple(range(len(labels)))
    return Observation(context.model, context.weights, gradients, 1, empty, labels, seeds)


def blind(context: LearningContext, labels: Tensor) -> dict[str, Tensor]:
    """The mean public image, and that of each victim's class, [N, 1, C, H, W]."""
    images, classes = context.take(torch.arange(context.size))
    means = torch.stack([images[classes == label].mean(0) for label in labels[:, 0].tolist()])
    return {"mean image": images.mean(0).expand_as(means)[:, None], "mean image of the class": means[:, None]}


def report(images: Tensor, found: Tensor, **about: object) -> None:
    """Print the mean scores of images."""
    rows = score(images, found)
    means = {key: round(sum(getattr(row, key) for row in rows) / len(rows), 3) for key in ("PSNR", "SSIM")}
    print(json.dumps({**about, "images": len(rows), **means}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=["mnist", "cifar10"])
    parser.add_argument("--noise", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--victims", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.datasets:
        images, labels, context = observed(load_dataset(DATASETS[name](), options.data_dir), options.victims)
        began = time.perf_counter()
        learned: Trained = GenerativeConfig().build().learn(context)
        seconds = round(time.perf_counter() - began, 1)
        line = {"dataset": name, "ceiling": round(learned.ceiling, 2), "encoder": round(learned.read, 2)}
        print(json.dumps({**line, "public": learned.images, "seconds": seconds}), flush=True)
        for guess, found in blind(context, labels).items():
            report(images, found, dataset=name, guess=guess)
        clean = clean_observation(context, images, labels)
        noise = torch.randn(clean.gradients.shape, generator=torch.Generator().manual_seed(1))
        attacks = {
            "gia": GIAConfig(iterations=1200).build(),
            "generative, refine: none": GenerativeConfig(refine="none").build().taught(learned),
            "generative, prior: 0, refine: none": GenerativeConfig(refine="none", prior=0).build().taught(learned),
            "generative": GenerativeConfig().build().taught(learned),
        }
        for sigma in options.noise:
            seen = replace(clean, gradients=clean.gradients + sigma * noise)
            for attack, built in attacks.items():
                found = built.reconstruct(seen)
                report(images, found.images, dataset=name, sigma=sigma, attack=attack, seconds=found.seconds)


if __name__ == "__main__":
    main()
