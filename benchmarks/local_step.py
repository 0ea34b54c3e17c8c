"""What could make one client's local step faster than the plain one, on one core, and at what error.

    python -m benchmarks.local_step [--clients 13]

The DLG LeNet on 1×28×28, batch 32. Each variant takes the gradients of some clients at the same weights; all are
timed in rotation, and the least time of each counts. A JSON line each: milliseconds a client, the share of the
plain step's time, and the relative error of the gradients against the plain step's.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.workload import BATCH, LeNet, labels, pixels

TURNS = 30
Variant = Callable[[], list[Tensor]]


def one_by_one(module: nn.Module, images: Tensor, classes: Tensor, bf16: bool = False) -> list[Tensor]:
    """One client after the other by autograd."""
    rows = []
    for x, y in zip(images.split(BATCH), classes.split(BATCH), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(module(x), y)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        rows.append(torch.cat([gradient.float().reshape(-1) for gradient in gradients]))
    return rows


def fused(module: nn.Sequential, images: Tensor, classes: Tensor) -> list[Tensor]:
    """All clients in one pass; only the gradients of weights and biases are formed client by client."""
    inputs, outputs, at = [], [], images
    for layer in module:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            inputs.append(at.detach())
            weight, bias = layer.weight.detach(), layer.bias.detach()
            convolves = isinstance(layer, nn.Conv2d)
            at = (
                F.conv2d(at, weight, bias, layer.stride, layer.padding)
                if convolves
                else F.linear(at, weight, bias)
            )
            outputs.append(at if at.requires_grad else at.requires_grad_())
        else:
            at = layer(at)
    slopes = torch.autograd.grad(F.cross_entropy(at, classes, reduction="sum") / BATCH, outputs)
    owners = [layer for layer in module if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [
        torch.cat(
            [
                part.reshape(-1)
                for layer, x, slope in zip(owners, inputs, slopes, strict=True)
                for part in _weight_gradients(layer, x[client], slope[client])
            ]
        )
        for client in (slice(first, first + BATCH) for first in range(0, len(images), BATCH))
    ]


def _weight_gradients(layer: nn.Conv2d | nn.Linear, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Linear):
        return slope.T @ x, slope.sum(0)
    shape, stride, padding = layer.weight.shape, layer.stride, layer.padding
    return torch.nn.grad.conv2d_weight(x, shape, slope, stride, padding), slope.sum((0, 2, 3))


def variants(clients: int) -> dict[str, Variant]:
    """The ways to take the gradients of so many clients."""
    torch.manual_seed(0)
    module, count = LeNet(), clients * BATCH
    images, classes = torch.from_numpy(pixels(count)).float().div_(255), torch.from_numpy(labels(count))
    last = copy.deepcopy(module).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    return {
        "plain": lambda: one_by_one(module, images, classes),
        "channels_last": lambda: one_by_one(last, images_last, classes),
        "bf16": lambda: one_by_one(module, images, classes, bf16=True),
        "channels_last_bf16": lambda: one_by_one(last, images_last, classes, bf16=True),
        "fused": lambda: fused(module, images, classes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=13)
    clients = parser.parse_args().clients
    torch.set_num_threads(1)
    ways = variants(clients)
    expected = torch.stack(ways["plain"]())
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(TURNS):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            least[name] = min(least[name], time.perf_counter() - start)
    errors = {name: float((torch.stack(run()) - expected).norm() / expected.norm()) for name, run in ways.items()}
    for name in ways:
        print(
            json.dumps(
                {
                    "variant": name,
                    "ms_a_client": round(1000 * least[name] / clients, 3),
                    "of_plain": round(least[name] / least["plain"], 3),
                    "error": float(f"{errors[name]:.2g}"),
                }
            )
        )


if __name__ == "__main__":
    main()
