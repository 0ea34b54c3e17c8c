"""How many labels of batches are recovered, and how many images a linear layer gives away; prints JSON lines.

.venv/bin/python benchmarks/closed_forms.py --data-dir DIR
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.attacks.analytic import AnalyticConfig
from fedsim.attacks.labels import recover_labels
from fedsim.data.datasets import CIFAR10Config, Dataset, load_dataset
from fedsim.learning.models import ConvNet64Config, LeNetConfig, MLPConfig, Model, build_model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Observation


def observe(dataset: Dataset, model: Model, victims: int, batch: int) -> tuple[Tensor, Tensor, Observation]:
    """Test images [N, B, C, H, W], their labels, and what the server sees of them."""
    order = torch.randperm(len(dataset.test_labels), generator=torch.Generator().manual_seed(0))
    chosen = order[: victims * batch].numpy()
    images = torch.tensor(dataset.test_images[chosen]).float().div(255).view(victims, batch, *dataset.shape)
    labels = torch.tensor(dataset.test_labels[chosen]).view(victims, batch)
    weights = model.initial_weights().requires_grad_()
    losses = (F.cross_entropy(model.logits(weights, x), y) for x, y in zip(images, labels, strict=True))
    gradients = torch.stack([torch.autograd.grad(loss, weights)[0] for loss in losses])
    seeds, empty = tuple(range(victims)), gradients.new_zeros(victims, 0)
    return images, labels, Observation(model, weights.detach(), gradients, batch, empty, None, seeds)


def labels_right(found: Tensor, labels: Tensor) -> float:
    """Share of labels found, each batch as a multiset."""
    counts = [torch.stack([row.bincount(minlength=10) for row in rows]) for rows in (found, labels)]
    return float(torch.minimum(*counts).sum() / labels.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    dataset = load_dataset(CIFAR10Config(), parser.parse_args().data_dir)
    models = [LeNetConfig(), LeNetConfig(init="uniform"), MLPConfig(), ConvNet64Config()]
    for config in models:
        large = config.name == "convnet64"
        for batch in (4, 16) if large else (4, 16, 64):
            model = build_model(config, dataset.shape, 10, seed=0)
            _, labels, observation = observe(dataset, model, 2 if large else 8, batch)
            share = labels_right(recover_labels(observation), labels)
            print(json.dumps({"model": config.name, "init": config.init, "batch": batch, "labels_right": share}))
    for width in (256, 1024):
        for batch in (1, 2, 4, 8, 16):
            model = build_model(MLPConfig(hidden=(width,)), dataset.shape, 10, seed=0)
            images, _, observation = observe(dataset, model, 8, batch)
            rows = score(images, AnalyticConfig().build().reconstruct(observation).images)
            above = sum(row.PSNR > 30 for row in rows) / len(rows)
            print(json.dumps({"attack": "analytic", "neurons": width, "batch": batch, "above_30_dB": above}))


if __name__ == "__main__":
    main()
