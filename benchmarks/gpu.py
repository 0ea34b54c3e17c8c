"""Rounds on a GPU beside a loop over the clients on the same GPU, and where their time goes.

    python -m benchmarks.gpu rounds [--clients 10 100 1000 10000] [--workers 1 4 8] [--rounds 8]
    python -m benchmarks.gpu where [--clients 1000]
    python -m benchmarks.gpu step [--model lenet] [--clients 16 128]

The workload is that of `benchmarks.engine`: the DLG LeNet on 1×28×28, batches of 32, one local step; of 10,000
clients with 60 images each. The loop trains one client after the other, its data on the GPU, too. `rounds` gives
medians after nine rounds of warming up, and how many times as long the loop takes (measured on 100 clients).
`where` takes a round of one worker apart, in one process without Ray. `step` is the local step alone, launched
kernel by kernel and replayed as a graph. For attacks on a GPU see `benchmarks.attacks`. One JSON line each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.engine import experiment, federation_of, synthetic
from benchmarks.peers.workload import BATCH, RATE, LeNet, train
from fedsim.config import parse_config
from fedsim.data.datasets import Dataset
from fedsim.engine.chunks import ChunkTask, run_chunks
from fedsim.engine.dealing import split_evenly
from fedsim.engine.runtime import Runtime
from fedsim.engine.session import Session
from fedsim.environment import local_device
from fedsim.learning.batches import ImageStore
from fedsim.learning.models import build_model
from fedsim.learning.training import VectorizedTrainer
from fedsim.preparation import prepare

CLIENTS, IMAGES = 10_000, 60
DEVICE = local_device()
LOOPED = 100
"""Clients that the loop trains when it is timed."""


def timed(job: Callable[[], object], turns: int = 7, warm_up: int = 5) -> float:
    """Return the median milliseconds of a job, until the GPU has done it."""
    seconds = []
    for _ in range(warm_up + turns):
        start = time.perf_counter()
        job()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[warm_up:])


def loop_ms_a_client() -> float:
    """Milliseconds of one client in a plain loop: FedAvg of one local step."""
    model, rng = LeNet().to(DEVICE), np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (LOOPED * IMAGES, 1, 28, 28), dtype=np.uint8)).to(DEVICE)
    images, labels = images.float().div_(255), torch.arange(LOOPED * IMAGES, device=DEVICE) % 10

    def one_round() -> None:
        start = {name: value.clone() for name, value in model.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for client in range(LOOPED):
            model.load_state_dict(start)
            mine = slice(client * IMAGES, (client + 1) * IMAGES)
            train(model, images[mine], labels[mine], 1)
            for name, value in model.state_dict().items():
                total[name].add_(value, alpha=1 / LOOPED)
        model.load_state_dict(total)

    return timed(one_round, turns=3, warm_up=2) / LOOPED


def rounds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    dataset, plain = synthetic(CLIENTS, IMAGES), loop_ms_a_client()
    yield {"loop_ms_a_client": round(plain, 3)}
    for workers in options.workers:
        shares = {"workers": workers, "gpus_per_worker": 1 / workers}
        with Runtime(parse_config({"runtime": shares}).runtime) as runtime:
            for per_round in options.clients:
                config = experiment(per_round, 1, workers, CLIENTS)
                federation = federation_of(config, dataset, runtime)
                first = timed(lambda f=federation: f.run_round(f.rounds_done), 1, 0)
                ms = timed(lambda f=federation: f.run_round(f.rounds_done), options.rounds, 8)
                record = federation.run_round(federation.rounds_done)
                yield {
                    "workers": workers,
                    "clients_a_round": per_round,
                    "first_ms": round(first),
                    "ms": round(ms, 1),
                    "loop_times_as_long": round(plain * per_round / ms, 1),
                    "training_ms_a_worker": round(1000 * record.local_seconds / workers, 1),
                    "beyond_ms": round(1000 * record.idle_seconds, 1),
                }
                federation.close()


def where(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    dataset = synthetic(CLIENTS, IMAGES)
    for per_round in options.clients:
        yield _where(dataset, per_round)


def _where(dataset: Dataset, per_round: int) -> dict[str, Any]:
    spec = prepare(experiment(per_round, 1, 1, CLIENTS), dataset).spec
    session = Session(spec, dataset, DEVICE)
    width = spec.config.chunk_width(per_round, DEVICE)
    tasks = [ChunkTask(0, part) for part in split_evenly(spec.cohort(0), width)]
    weights = session.model.initial_weights().to(DEVICE)
    schedules = [spec.schedules(0, task.clients) for task in tasks]
    batches = [np.stack([batch for (batch,) in chunk]) for chunk in schedules]
    step = VectorizedTrainer(session.model, session.train_data, RATE)._first_step
    taken = [session.train_data.take(part) for part in batches]
    ms = {
        "whole": timed(lambda: run_chunks(session, weights, {}, tasks, 0)[0].cpu()),
        "drawing_batches": timed(lambda: [spec.schedules(0, task.clients) for task in tasks]),
        "taking_images": timed(lambda: [session.train_data.take(part) for part in batches]),
        "training": timed(lambda: [step(weights, *part) for part in taken]),
        "training_kernel_by_kernel": timed(lambda: [step.function(weights, *part) for part in taken]),
    }
    return {"clients_a_round": per_round, "chunks": len(tasks)} | {k: round(v, 2) for k, v in ms.items()}


def step(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    config = parse_config({"model": {"name": options.model}})
    shape = tuple(options.shape)
    model = build_model(config.model, shape, 10, seed=0).to(DEVICE)
    rng, most = np.random.default_rng(0), max(options.clients)
    pixels = rng.integers(0, 256, (most * BATCH, *shape), dtype=np.uint8)
    data = ImageStore.of(pixels, rng.integers(0, 10, most * BATCH), DEVICE)
    weights = model.initial_weights().to(DEVICE)
    images, labels = data.take(np.arange(BATCH))
    parameters = list(model.module.parameters())
    plain = timed(lambda: torch.autograd.grad(F.cross_entropy(model.module(images), labels), parameters))
    for clients in options.clients:
        trainer = VectorizedTrainer(model, data, RATE)
        batch = data.take(np.arange(clients * BATCH).reshape(clients, BATCH))
        ways = {
            "vectorized": lambda t=trainer, b=batch: t._first_step.function(weights, *b),
            "graph": lambda t=trainer, b=batch: t._first_step(weights, *b),
        }
        own = weights.expand(clients, -1).contiguous()
        ways["graph_own_weights"] = lambda t=trainer, b=batch, w=own: t._step(w, *b)
        ms = {way: timed(job) for way, job in ways.items()}
        yield {
            "model": options.model,
            "shape": shape,
            "clients": clients,
            "plain_ms_a_client": round(plain, 3),
            **{f"{way}_ms_a_client": round(value / clients, 4) for way, value in ms.items()},
            **{f"plain_times_{way}": round(plain * clients / value, 1) for way, value in ms.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["rounds", "where", "step"])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--shape", type=int, nargs=3, default=(1, 28, 28))
    options = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"}), flush=True)
    for row in {"rounds": rounds, "where": where, "step": step}[options.part](options):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
