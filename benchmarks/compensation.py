"""What the server's denoiser gets out of one client's gradient, with and without clipping; prints JSON lines.

.venv/bin/python -m benchmarks.compensation --data-dir DIR

GradDefense with its default slices on single test images, an untrained LeNet. `sent` and `denoised` are distances
to the true gradient, relative to its length, means over the victims; `nearer` counts those that came nearer
by denoising. Clipping is to the norm σ, as in the published code.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.closed_forms import observe
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.strategies import denoise
from fedsim.data.datasets import CIFAR10Config, MNISTConfig, load_dataset
from fedsim.defenses.base import ClientBatch, ClientContext, PublicContext
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.learning.models import Initialisation, LeNetConfig, build_model
from fedsim.privacy.observation import Knowledge

DATASETS: dict[str, type[MNISTConfig | CIFAR10Config]] = {"mnist": MNISTConfig, "cifar10": CIFAR10Config}
STRENGTHS: list[tuple[Initialisation, float]] = [
    ("default", 5e-4),
    ("default", 0.01),
    ("default", 0.1),
    ("uniform", 0.1),
    ("uniform", 1.0),
]
ROOT = 50
"""Public images for the risk of layers; the last test images."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--victims", type=int, default=32)
    options, attack = parser.parse_args(), GIAConfig().build()
    for name, config in DATASETS.items():
        dataset = load_dataset(config(), options.data_dir)
        root = torch.from_numpy(dataset.test_images[-ROOT:].copy()).float().div(255)
        root_labels = torch.from_numpy(dataset.test_labels[-ROOT:].copy())
        for init, sigma in STRENGTHS:
            model = build_model(LeNetConfig(init=init), dataset.shape, dataset.classes, seed=0)
            images, labels, clean = observe(dataset, model, options.victims, 1)
            true, weights = clean.gradients, clean.weights
            batch = ClientBatch(torch.arange(options.victims), images, labels)
            for norm in (None, sigma):
                settings = GradDefenseConfig(sigma=sigma, clipping_norm=norm)
                defense = settings.build()
                first = torch.Generator().manual_seed(0)
                public = defense.prepare(PublicContext(model, weights, root, root_labels, first))
                streams = [torch.Generator().manual_seed(victim) for victim in range(options.victims)]
                sent = defense.protect(true, ClientContext(model, weights, [batch], streams, public))
                knowledge = Knowledge(settings, public, {}, sent[:, None][:, :0])
                cleaned = denoise(replace(clean, gradients=sent), knowledge, attack).gradients
                before, after = ((g - true).norm(dim=1) / true.norm(dim=1) for g in (sent, cleaned))
                line = {"dataset": name, "init": init, "sigma": sigma, "clipped": norm is not None}
                line |= {"sent": round(float(before.mean()), 3), "denoised": round(float(after.mean()), 3)}
                print(json.dumps(line | {"nearer": int((after < before).sum())}), flush=True)


if __name__ == "__main__":
    main()
