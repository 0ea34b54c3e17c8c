"""The work of one client, for the plain loop and for other frameworks: it needs PyTorch and NumPy, not fedsim."""

import argparse
import json
import statistics
import time
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLIENTS, IMAGES, BATCH, RATE = 100, 600, 32, 0.1


def pixels(count: int) -> np.ndarray:
    """Noise, uint8 [count, 1, 28, 28]: what an image shows does not change how long it takes."""
    return np.random.default_rng(0).integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    """Ten classes in turn, int64 [count]."""
    return np.arange(count) % 10


class LeNet(nn.Sequential):
    """The network of the DLG paper for 1×28×28."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 12, 5, padding=2, stride=2), nn.Sigmoid()),
            *(nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.Sigmoid()),
            *(nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid()),
            *(nn.Flatten(), nn.Linear(588, 10)),
        )


def train(model: nn.Module, images: Tensor, classes: Tensor, steps: int) -> int:
    """Take some local steps, or one epoch (0), on a client's images; return how many were used."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    batches = torch.randperm(len(images)).split(BATCH)[: steps or None]
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), classes[batch]).backward()
        optimizer.step()
    return sum(map(len, batches))


class Clients:
    """The images of all clients, in the memory of this process."""

    def __init__(self) -> None:
        self.images = torch.from_numpy(pixels(CLIENTS * IMAGES)).float().div_(255)
        self.labels = torch.from_numpy(labels(CLIENTS * IMAGES))

    def __getitem__(self, client: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels of one client."""
        mine = slice(client * IMAGES, (client + 1) * IMAGES)
        return self.images[mine], self.labels[mine]


@cache
def clients() -> Clients:
    """Return the images of all clients, made once in each process."""
    return Clients()


def arguments() -> argparse.Namespace:
    """Read what every peer is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=100, help="clients a round")
    parser.add_argument("--steps", type=int, default=1, help="local steps; 0: one epoch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    return parser.parse_args()


class Watch:
    """Notes when rounds end; the first one pays for the start and does not count."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def round_done(self) -> None:
        """Note the end of a round."""
        self.ends.append(time.perf_counter())

    def report(self) -> None:
        """Print the line that `benchmarks.engine` reads."""
        seconds = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        print(json.dumps({"seconds_per_round_median": statistics.median(seconds)}), flush=True)
