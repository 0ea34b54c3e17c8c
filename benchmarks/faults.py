"""Kill workers and the server at random moments: no client is lost, and the final weights are the same bits.

    python -m benchmarks.faults [--rounds 200] [--kills 0.1] [--workers 3] [--model mlp] [--transport calls]

A run that nobody disturbs, and one in which a round in so many has a process killed (SIGKILL), whichever it is and
at any moment of the round. One JSON line each: seconds, how many were killed, what the run says of it, how many
rounds went through sockets. The last one says whether each round had all its clients, and both the same weights.
"""

import argparse
import json
import os
import random
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError

from benchmarks.engine import federation_of, synthetic
from fedsim.config import ExperimentConfig, parse_config
from fedsim.data.datasets import Dataset
from fedsim.engine.runtime import Runtime

PER_ROUND = 50


class Killer:
    """Kills one of these processes now and then.

    Attributes:
        killed: How many so far.
    """

    def __init__(self, runtime: Runtime, probability: float, within: float, seed: int) -> None:
        """Kill in a round with this probability, and at a moment up to `within` s after its begin."""
        self._actors = [*runtime.pool.workers, runtime.server]
        self._probability, self._within, self._random = probability, within, random.Random(seed)
        self.killed = 0

    def begin_round(self) -> None:
        """Decide whether, whom and when."""
        if self._random.random() >= self._probability:
            return
        with suppress(RayActorError):  # it has not come back from the last time
            process = ray.get(self._random.choice(self._actors).pid.remote())
            threading.Timer(self._random.uniform(0, self._within), self._kill, [process]).start()

    def _kill(self, process: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            self.killed += 1


def experiment(options: argparse.Namespace) -> ExperimentConfig:
    """GradDefense and Adam: a defense and an optimiser with memory."""
    return parse_config(
        {
            "model": {"name": options.model},
            "defense": {"name": "graddefense"},
            "federation": {"clients_per_round": PER_ROUND, "clients": 100, "server": {"name": "adam"}},
            "runtime": {"workers": options.workers, "transport": options.transport},
        }
    )


def run(
    config: ExperimentConfig, dataset: Dataset, runtime: Runtime, rounds: int, killer: Killer | None
) -> tuple[dict[str, Any], list[int], NDArray[np.float32]]:
    """Return what to print, the clients of each round, and the final weights."""
    federation = federation_of(config, dataset, runtime)
    began, clients = time.perf_counter(), []
    for number in range(rounds):
        if killer:
            killer.begin_round()
        clients.append(federation.run_round(number).clients)
    seconds = time.perf_counter() - began
    row = {"seconds": round(seconds, 2), "killed": killer.killed if killer else 0, **asdict(federation.faults)}
    weights = federation.weights()
    federation.close()
    return row | {"rounds_by_wire": federation.rounds_by_wire}, clients, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--kills", type=float, default=0.1, help="probability of a kill in a round")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--model", choices=("lenet", "mlp"), default="lenet")
    parser.add_argument("--transport", choices=("auto", "calls"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config, dataset = experiment(options), synthetic()
    with Runtime(config.runtime) as runtime:
        calm, _, expected = run(config, dataset, runtime, options.rounds, None)
        print(json.dumps(calm), flush=True)
        killer = Killer(runtime, options.kills, calm["seconds"] / options.rounds, options.seed)
        disturbed, clients, weights = run(config, dataset, runtime, options.rounds, killer)
        print(json.dumps(disturbed), flush=True)
    if options.kills and not disturbed["killed"]:
        raise SystemExit("nothing was killed, so nothing is shown: more --rounds or --kills")
    same = {"all_clients": set(clients) == {PER_ROUND}, "same_bits": bool(np.array_equal(weights, expected))}
    print(json.dumps(same))
    raise SystemExit(not all(same.values()))


if __name__ == "__main__":
    main()
