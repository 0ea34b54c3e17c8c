"""Where R-GAP holds up: what each model's layers determine, and how well images are found; prints JSON lines.

.venv/bin/python -m benchmarks.r_gap --data-dir DIR

Test images, one behind each gradient. `noise` is the standard deviation of what was added to every entry of the
gradient, as a share of the root mean square of the parameter it belongs to.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.closed_forms import observe
from fedsim.attacks.r_gap import RGAPConfig, rank_analysis
from fedsim.data.datasets import CIFAR10Config, MNISTConfig, load_dataset, mean_image
from fedsim.learning.models import LeNet4Config, LeNetConfig, MLPConfig, Model, build_model
from fedsim.privacy.metrics import floors, score
from fedsim.privacy.observation import Observation

Shape = tuple[int, int, int]
DATASETS = {"mnist": MNISTConfig, "cifar10": CIFAR10Config}


def convolutions(shape: Shape, width: int, activation: Callable[[], nn.Module], bias: bool = True) -> Model:
    """Three 5×5 convolutions as in LeNet, of another width, activation or without biases."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels, height, side = shape
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(channels, width, 5, stride, 2, bias=bias), activation()]
        channels, height, side = width, -(-height // stride), -(-side // stride)
    return Model(nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * side, 10, bias=bias)), shape, 10)


def models(shape: Shape) -> dict[str, Model]:
    """The models, by name."""
    named = {"lenet": LeNetConfig(), "lenet, U(-0.5, 0.5)": LeNetConfig(init="uniform"), "lenet4": LeNet4Config()}
    built = {name: build_model(config, shape, 10, seed=0) for name, config in named.items()}
    return built | {
        "mlp 256-256": build_model(MLPConfig(hidden=(256, 256)), shape, 10, seed=0),
        "leaky relu, no biases": convolutions(shape, 12, lambda: nn.LeakyReLU(0.2), bias=False),
        "tanh": convolutions(shape, 12, nn.Tanh),
        "relu": convolutions(shape, 12, nn.ReLU),
        "sigmoid, 6 channels": convolutions(shape, 6, nn.Sigmoid),
        "sigmoid, 3 channels": convolutions(shape, 3, nn.Sigmoid),
    }


def noisy(observation: Observation, share: float) -> Observation:
    """What is seen behind noise of `share` of each parameter's root mean square."""
    sent, generator = observation.gradients.clone(), torch.Generator().manual_seed(1)
    for part in sent.split(observation.model.layout.sizes, 1):
        part += share * part.square().mean(1, keepdim=True).sqrt() * torch.randn(part.shape, generator=generator)
    return replace(observation, gradients=sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", choices=sorted(DATASETS), default=sorted(DATASETS))
    parser.add_argument("--models", nargs="+", help="names of models; default: all")
    parser.add_argument("--victims", type=int, default=4)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0])
    parser.add_argument("--resolution", type=float, nargs="+", default=[1e-6])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.datasets:
        dataset = load_dataset(DATASETS[name](), options.data_dir)
        mean = torch.from_numpy(mean_image(dataset))
        for title, model in models(dataset.shape).items():
            if options.models and title not in options.models:
                continue
            images, labels, observation = observe(dataset, model, options.victims, 1)
            ranks = rank_analysis(model, observation.weights, images[0, 0], int(labels[0, 0]))
            head = {"dataset": name, "model": title, "images": options.victims}
            head["open"] = {rank.layer: rank.deficiency for rank in ranks if rank.deficiency}
            head["condition"] = round(max(rank.condition for rank in ranks))
            guesses = floors(images, mean, 0).values()
            head["floor"] = round(max(sum(row.PSNR for row in rows) / len(rows) for rows in guesses), 1)
            for noise, resolution in ((n, r) for n in options.noise for r in options.resolution):
                found = RGAPConfig(resolution=resolution).build().reconstruct(noisy(observation, noise))
                scores = sorted(round(row.PSNR, 1) for row in score(images, found.images))
                line = {"noise": noise, "resolution": resolution, "seconds": round(found.seconds / len(scores), 1)}
                print(json.dumps(head | line | {"mean_PSNR": round(sum(scores) / len(scores), 1), "PSNR": scores}),
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
