"""What not knowing the clients' learning rate costs an attacker; prints JSON lines.

.venv/bin/python -m benchmarks.learning_rate --data-dir DIR

Test images, LeNet, updates of several local steps of one image each. The attacker knows the rate, estimates it, or
takes it for half or twice what it is.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.attacks.autodiff import Autodiff
from fedsim.attacks.base import AttackSettings
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.gia import GIAConfig
from fedsim.data.datasets import CIFAR10Config, Dataset, MNISTConfig, load_dataset
from fedsim.learning.models import LeNetConfig, build_model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import LocalTraining, Observation

DATASETS = {"mnist": MNISTConfig, "cifar10": CIFAR10Config}


def observe(dataset: Dataset, init: str, victims: int, local: LocalTraining) -> tuple[Tensor, Observation]:
    """Test images [N, steps, C, H, W], and the sums of the gradients along the way of those clients."""
    model = build_model(LeNetConfig(init=init), dataset.shape, 10, seed=0)
    order = torch.randperm(len(dataset.test_labels), generator=torch.Generator().manual_seed(0))
    chosen = order[: victims * local.steps].numpy()
    shape = victims, local.steps
    images = torch.tensor(dataset.test_images[chosen]).float().div(255).view(*shape, *dataset.shape)
    labels = torch.tensor(dataset.test_labels[chosen]).view(shape)
    weights, truth = model.initial_weights(), F.one_hot(labels, 10).float()
    sums, _ = Autodiff(model, weights, local).gradients(images, truth)
    seeds, empty = tuple(range(victims)), sums.new_zeros(victims, 0)
    return images, Observation(model, weights, sums, local.steps, empty, labels, seeds, local=local)


def views(observation: Observation) -> dict[str, Observation]:
    """What attackers make of the same updates who know, estimate or mistake the rate."""
    true = observation.local.learning_rate
    assert true is not None
    moved = observation.gradients * true
    rates = {"known": true, "estimated": None, "taken for half": true / 2, "taken for twice": true * 2}
    return {
        name: replace(
            observation, gradients=moved / (rate or 1), local=replace(observation.local, learning_rate=rate)
        )
        for name, rate in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", choices=sorted(DATASETS), default=sorted(DATASETS))
    parser.add_argument("--init", nargs="+", choices=["default", "uniform"], default=["default", "uniform"])
    parser.add_argument("--attacks", nargs="+", choices=["dlg", "gia"], default=["dlg", "gia"])
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--precision", choices=["auto", "float32", "float64"], default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    attacks: dict[str, AttackSettings] = {
        "dlg": DLGConfig(iterations=options.iterations, labels="known", precision=options.precision),
        "gia": GIAConfig(iterations=options.iterations),
    }
    for name in options.datasets:
        dataset = load_dataset(DATASETS[name](), options.data_dir)
        for init, rate in ((init, rate) for init in options.init for rate in options.rates):
            images, observation = observe(dataset, init, options.victims, LocalTraining(options.steps, rate))
            head = {"dataset": name, "init": init, "rate": rate, "steps": options.steps}
            for attack in options.attacks:
                for knowledge, seen in views(observation).items():
                    found = attacks[attack].build().reconstruct(seen)
                    rows = score(images, found.images)
                    line = head | {"attack": attack, "learning_rate": knowledge, "images": len(rows)}
                    line["PSNR"] = round(sum(row.PSNR for row in rows) / len(rows), 2)
                    if found.learning_rates is not None:
                        line["worst_error"] = round(float((found.learning_rates / rate - 1).abs().max()), 5)
                    print(json.dumps(line | {"seconds": round(found.seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
