"""What a client's local step costs on one core in each way that the engine has, and at what error.

    python -m benchmarks.local_step [--model lenet] [--shape 1 28 28] [--batch 4 8 16 32 64] [--clients 12]

The clients of a chunk take one step from the same weights; all ways are timed in rotation, and medians count.
A JSON line each: milliseconds a client, the share of the plain loop's time, and the relative error of the
gradients against the plain loop's. These are the figures behind `choose_execution` and `choose_memory_format`.
"""

import argparse
import json
import statistics
import time

import numpy as np

from fedsim.config import parse_config
from fedsim.engine.process import start_process
from fedsim.learning.batches import ImageStore
from fedsim.learning.fused import FusedTrainer
from fedsim.learning.models import Model, build_model
from fedsim.learning.training import LocalTrainer, LoopTrainer, VectorizedTrainer

TURNS = 15
RATE = 0.1


def ways(model: Model, data: ImageStore, fusable: bool) -> dict[str, LocalTrainer]:
    """The trainers, by name."""
    trainers: dict[str, LocalTrainer] = {
        "loop": LoopTrainer(model, data, RATE),
        "loop, channels-last": LoopTrainer(model, data, RATE, "channels_last"),
        "loop, channels-last, bfloat16": LoopTrainer(model, data, RATE, "channels_last", "bfloat16"),
        "vectorized": VectorizedTrainer(model, data, RATE),
    }
    if fusable:
        trainers["fused, channels-last"] = FusedTrainer(model, data, RATE, "channels_last")
    return trainers


def measure(options: argparse.Namespace, batch: int) -> None:
    config = parse_config({"model": {"name": options.model}})
    shape = tuple(options.shape)
    model = build_model(config.model, shape, 10, seed=0)
    count = options.clients * batch
    rng = np.random.default_rng(0)
    data = ImageStore.of(rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, 10, count), "cpu")
    weights = model.initial_weights()
    schedules = [[np.arange(at, at + batch)] for at in range(0, count, batch)]
    all_ways = ways(model, data, fusable=config.model.fused_batch > 0)
    expected = all_ways["loop"].train(weights, schedules).updates
    seconds: dict[str, list[float]] = {name: [] for name in all_ways}
    for _ in range(TURNS):
        for name, trainer in all_ways.items():
            start = time.perf_counter()
            trainer.train(weights, schedules)
            seconds[name].append(time.perf_counter() - start)
    plain = statistics.median(seconds["loop"])
    for name, trainer in all_ways.items():
        median = statistics.median(seconds[name])
        error = float((trainer.train(weights, schedules).updates - expected).norm() / expected.norm())
        row = {"batch": batch, "way": name, "ms_a_client": round(1000 * median / options.clients, 3)}
        print(json.dumps(row | {"of_loop": round(median / plain, 3), "error": float(f"{error:.2g}")}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--shape", type=int, nargs=3, default=(1, 28, 28))
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--clients", type=int, default=12, help="clients a chunk")
    options = parser.parse_args()
    start_process([])  # as a worker does
    for batch in options.batch:
        measure(options, batch)


if __name__ == "__main__":
    main()
