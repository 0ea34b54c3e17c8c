"""A round of the engine beside a plain loop over the clients and beside other frameworks, in one sitting.

    python -m benchmarks.engine rounds [--clients 100] [--steps 1] [--workers 2] [--peer flower="python peer.py …"]
    python -m benchmarks.engine defenses [--pairs 30]
    python -m benchmarks.engine memory [--clients 10 100 1000 10000]
    python -m benchmarks.engine start
    python -m benchmarks.engine whole [--clients 100]

The workload: the DLG LeNet on 1×28×28, 100 clients with 600 images each, batches of 32, FedAvg; `--steps 0` is
one local epoch. `rounds` times blocks of each contender in rotation and prints medians over the blocks, with
ratios taken block by block: machines drift. `fedsim by calls` has Ray carry its messages. A peer is any command
that runs the same workload and ends with a JSON line that holds `seconds_per_round_median`: see
`benchmarks/peers`, which run in environments of their own. `defenses` times rounds with and without a defense in
turn. `memory` is what a worker has for itself, after rounds of growing size. `start` runs `fedsim run` twice on
one tracking database and times the second. `whole` is a run with evaluations, checkpoints and MLflow over the
sum of its rounds. One JSON line each.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from benchmarks.peers.workload import BATCH, CLIENTS, IMAGES, RATE, Clients, LeNet, labels, pixels, train
from fedsim.config import ExperimentConfig, parse_config
from fedsim.data.datasets import Dataset
from fedsim.engine.federation import Federation
from fedsim.engine.overhead import measure_overhead
from fedsim.engine.runtime import Runtime
from fedsim.preparation import prepare
from fedsim.simulation import Simulation
from fedsim.tracking import Tracker

DEFENSES = ("graddefense", "gc", "dp_gaussian", "dp_laplacian", "pld")


def synthetic(clients: int = CLIENTS, images: int = IMAGES) -> Dataset:
    """The workload's data set; fifty more images are the root set."""
    count = clients * images + 50
    images_, labels_, names = pixels(count), labels(count), tuple(map(str, range(10)))
    return Dataset("synthetic", images_, labels_, images_[:2000], labels_[:2000], names, f"synthetic-{count}")


def experiment(per_round: int, steps: int, workers: int, clients: int = CLIENTS, **more: Any) -> ExperimentConfig:
    """The workload as an experiment."""
    federation = {
        "clients": clients,
        "clients_per_round": per_round,
        "batch_size": BATCH,
        "local_steps": steps or None,
        "learning_rate": RATE,
    }
    return parse_config({"federation": federation, "runtime": {"workers": workers}, **more})


def federation_of(config: ExperimentConfig, dataset: Dataset, runtime: Runtime) -> Federation:
    return Federation(prepare(config, dataset).spec, dataset, runtime)


class PlainLoop:
    """The floor: FedAvg over the clients of a round, one after the other, in one process and one thread."""

    def __init__(self, per_round: int, steps: int) -> None:
        torch.set_num_threads(1)
        self.clients, self.model = Clients(), LeNet()
        self.per_round, self.steps = per_round, steps
        self.rng = np.random.default_rng(0)

    def round(self, number: int) -> None:
        """Run one round."""
        start = {name: value.clone() for name, value in self.model.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for client in self.rng.choice(CLIENTS, self.per_round, replace=False):
            self.model.load_state_dict(start)
            train(self.model, *self.clients[int(client)], self.steps)
            for name, value in self.model.state_dict().items():
                total[name].add_(value, alpha=1 / self.per_round)
        self.model.load_state_dict(total)


def timed(run: Callable[[int], object], rounds: int, first: int) -> float:
    """Return the median seconds of some rounds."""
    seconds = []
    for round_ in range(first, first + rounds):
        start = time.perf_counter()
        run(round_)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peer_seconds(command: str) -> float:
    """Return the median seconds of a round that a peer reports on its last line."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{command} failed, see above")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds_per_round_median"])


def rounds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    dataset, per_round, steps = synthetic(), options.clients[0], options.steps
    plain = PlainLoop(per_round, steps)
    peers = dict(text.split("=", 1) for text in options.peer)
    blocks: dict[str, list[float]] = {}
    beyond: list[float] = []
    with Runtime(experiment(per_round, steps, options.workers).runtime) as runtime:
        federation = federation_of(experiment(per_round, steps, options.workers), dataset, runtime)

        def ours(round_: int) -> None:
            beyond.append(federation.run_round(round_).idle_seconds)

        def by_calls(round_: int) -> None:
            wires, runtime.pool.wires = runtime.pool.wires, None
            federation.run_round(round_)
            runtime.pool.wires = wires

        turns = {"fedsim": ours, "fedsim by calls": by_calls, "plain": plain.round}
        for block in range(options.blocks + 1):
            if block == 1:  # the first block warms up
                blocks.clear()
                beyond.clear()
            for name, run in turns.items():
                blocks.setdefault(name, []).append(timed(run, options.rounds, block * options.rounds))
            for name, command in peers.items() if block else ():
                blocks.setdefault(name, []).append(peer_seconds(command))
    yield {
        "workload": f"{per_round} clients, {f'{steps} step' if steps else '1 epoch'}, {options.workers} workers",
        "seconds": {name: round(statistics.median(values), 4) for name, values in blocks.items()},
        "times_slower_than_fedsim": {
            name: round(statistics.median(b / a for a, b in zip(blocks["fedsim"], values, strict=True)), 2)
            for name, values in blocks.items()
        },
        "ms_beyond_the_work": round(1000 * statistics.median(beyond), 2),
        "ms_beyond_the_work_a_client": round(1000 * statistics.median(beyond) / per_round, 3),
    }


def defenses(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    dataset, (per_round, *_) = synthetic(), options.clients
    config = experiment(per_round, 1, options.workers)
    with Runtime(config.runtime) as runtime:
        plain = federation_of(config, dataset, runtime)
        for number, name in enumerate(DEFENSES):
            with_defense = experiment(per_round, 1, options.workers, defense={"name": name})
            defended = federation_of(with_defense, dataset, runtime)
            ratio = measure_overhead(plain, defended, number * (options.pairs + 1), options.pairs)
            yield {"defense": name, "percent": [round(100 * v, 1) for v in (ratio.low, ratio.median, ratio.high)]}


def memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    largest = max(options.clients)
    dataset = synthetic(largest, BATCH)
    with Runtime(experiment(1, 1, options.workers).runtime) as runtime:
        for per_round in sorted(options.clients):
            federation = federation_of(experiment(per_round, 1, options.workers, largest), dataset, runtime)
            seconds = timed(federation.run_round, 3, 0)
            federation.close()
            workers = [psutil.Process(ray.get(worker.pid.remote())) for worker in runtime.pool.workers]
            yield {
                "clients_per_round": per_round,
                "seconds": round(seconds, 3),
                "worker_unique_mb": [round(worker.memory_full_info().uss / 1e6) for worker in workers],
                "driver_unique_mb": round(psutil.Process().memory_full_info().uss / 1e6),
            }


def start(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        database = f"tracking.uri=sqlite:///{folder}/mlflow.db"
        for name in ("first", "second"):
            command = [sys.executable, "-m", "fedsim", "run", "--output", f"{folder}/out", f"name={name}"]
            began = time.time()
            subprocess.run([*command, database, "federation.rounds=1"], check=True, capture_output=True)
            checkpoint = next(Path(f"{folder}/out/{name}/checkpoints").iterdir())
            whole, first = time.time() - began, checkpoint.stat().st_mtime - began
        yield {"seconds_to_first_round": round(first, 2), "seconds_whole_command": round(whole, 2)}
        config = experiment(10, 1, options.workers)
        dataset = synthetic()
        with Runtime(config.runtime) as runtime:
            for _ in range(2):
                began = time.time()
                federation_of(config, dataset, runtime).run_round(0)
                again = time.time() - began
        yield {"seconds_to_first_round_of_a_second_simulation": round(again, 3)}


def whole(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    dataset, (per_round, *_) = synthetic(), options.clients
    rounds = options.rounds * options.blocks
    config = experiment(per_round, options.steps, options.workers)
    lasting = config.federation.model_copy(update={"rounds": rounds, "evaluate_every": 10})
    config = config.model_copy(update={"federation": lasting})
    with tempfile.TemporaryDirectory() as folder, Runtime(config.runtime) as runtime:
        tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "whole", Path(folder) / "artifacts")
        for name in ("warm-up", "measured"):
            simulation = Simulation(
                config, output=f"{folder}/{name}", dataset=dataset, runtime=runtime, tracker=tracker
            )
            began = time.perf_counter()
            result = simulation.run()
            seconds = time.perf_counter() - began
        in_rounds = float(result.rounds["seconds"].sum())
        yield {"clients": per_round, "rounds": rounds, "seconds": round(seconds, 2)} | {
            "seconds_in_rounds": round(in_rounds, 2),
            "whole_over_rounds": round(seconds / in_rounds, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("rounds", "defenses", "memory", "start", "whole"))
    parser.add_argument("--clients", type=int, nargs="+", default=[100], help="clients a round")
    parser.add_argument("--steps", type=int, default=1, help="local steps; 0: one epoch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="rounds a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    options = parser.parse_args()
    for row in globals()[options.what](options):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
