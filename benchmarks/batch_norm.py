"""What batch-norm statistics and a group of searches give an attacker; prints JSON lines.

.venv/bin/python -m benchmarks.batch_norm --data-dir DIR

CIFAR-10 test images, gradients of an untrained network of two convolutions with batch norm and a linear layer.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.closed_forms import observe
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.gradinversion import GradInversionConfig
from fedsim.data.datasets import CIFAR10Config, load_dataset
from fedsim.learning.models import Model
from fedsim.privacy.metrics import score

SHAPE = (3, 32, 32)


def normed() -> Model:
    """The network; 13,082 parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    return Model(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 10)), SHAPE, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--victims", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    dataset = load_dataset(CIFAR10Config(), options.data_dir)
    common = {"iterations": options.iterations, "labels": "known"}
    one = {**common, "restarts": 1}
    attacks = {
        "gia": GIAConfig(**one),
        "gradinversion, no statistics, 1 search": GradInversionConfig(**one, statistics=0),
        "gradinversion, 1 search": GradInversionConfig(**one),
        "gradinversion, 4 searches, no group": GradInversionConfig(**common, group=0),
        "gradinversion, 4 searches": GradInversionConfig(**common),
    }
    for batch in options.batch:
        images, labels, observation = observe(dataset, normed(), options.victims, batch)
        model, weights = observation.model, observation.weights
        sent = torch.stack([model.statistics(weights, x) for x in images])
        observation = replace(observation, statistics=sent, labels=labels)
        for name, settings in attacks.items():
            rows = score(images, settings.build().reconstruct(observation).images)
            means = {key: round(sum(getattr(row, key) for row in rows) / len(rows), 3) for key in ("PSNR", "SSIM")}
            print(json.dumps({"attack": name, "batch": batch, "images": len(rows), **means}), flush=True)


if __name__ == "__main__":
    main()
