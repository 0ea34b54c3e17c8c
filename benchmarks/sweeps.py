"""What a sweep costs beside its simulations, and whether many trials leave anything behind.

    python -m benchmarks.sweeps overhead [--rounds 600]
    python -m benchmarks.sweeps leaks [--trials 40]

`overhead` runs one simulation bare (a runtime of its own, no MLflow) and as the second, warm trial of a sweep with
MLflow, and prints the ratio. `leaks` runs short trials and prints memory and open files of the driver and of all
processes below it as the trials end. One JSON line each.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from fedsim.config import RuntimeConfig
from fedsim.engine.runtime import Runtime
from fedsim.simulation import Simulation
from fedsim.sweep.config import SweepConfig
from fedsim.sweep.run import Sweep


def config_of(rounds: int, space: dict[str, Any], **settings: Any) -> SweepConfig:
    experiment = {
        "federation": {"rounds": rounds, "clients": 40, "clients_per_round": 10, "evaluate_every": 10},
        "attacks": [{"name": "dlg", "iterations": 50}],
        "audit": {"victims": 2},
    }
    data = {"name": "benchmark", "experiment": experiment, "space": space, "concurrent": 1, **settings}
    return SweepConfig.model_validate(data)


def overhead(rounds: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(config_of(rounds, {}, seeds=[0, 1]), Path(folder), console=Console(quiet=True))
        bare = sweep.config.experiment_at({}, 1)
        with Runtime(RuntimeConfig(workers=1)) as runtime:
            short = bare.model_copy(update={"federation": bare.federation.model_copy(update={"rounds": 1})})
            Simulation(short, runtime=runtime).run()
            began = time.monotonic()
            Simulation(bare, runtime=runtime, output=Path(folder) / "bare").run()
            alone = time.monotonic() - began
        began = time.monotonic()
        cold, warm = (one.metrics for one in sweep.run())
        yield {
            "bare_seconds": round(alone, 2),
            "trial_seconds": round(warm["trial_seconds"], 2),
            "overhead": round(warm["trial_seconds"] / alone - 1, 3),
            "setup_seconds_cold": round(cold["setup_seconds"], 2),
            "setup_seconds_warm": round(warm["setup_seconds"], 2),
            "sweep_seconds": round(time.monotonic() - began, 1),
        }


def leaks(trials: int) -> Iterator[dict[str, Any]]:
    rates = [round(0.05 + 0.001 * number, 3) for number in range(trials)]
    space = {"federation.learning_rate": {"grid": rates}}
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(config_of(5, space), Path(folder), console=Console(quiet=True))
        with watched(sweep) as rows:
            sweep.run()
        yield from rows


@contextmanager
def watched(sweep: Sweep) -> Iterator[list[dict[str, Any]]]:
    """Take the size of this process and of those below it about every second."""
    rows: list[dict[str, Any]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            ended = len(list(sweep.outcomes.path.glob("*.json")))
            if ended and (not rows or ended >= rows[-1]["trials"] + 5):
                rows.append({"trials": ended, **sizes()})

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield rows
    finally:
        over.set()
        thread.join()


def sizes() -> dict[str, Any]:
    """Return memory (proportional share, MiB) and open files of the driver and of all processes below it."""
    driver = psutil.Process()
    below = {"memory": 0.0, "files": 0, "processes": 0}
    for process in driver.children(recursive=True):
        try:
            below["memory"] += process.memory_full_info().pss / 2**20
            below["files"] += process.num_fds()
            below["processes"] += 1
        except psutil.NoSuchProcess:
            continue
    own = driver.memory_full_info().pss / 2**20
    return {"driver_mib": round(own), "driver_files": driver.num_fds(), **{k: round(v) for k, v in below.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("overhead", "leaks"))
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--trials", type=int, default=40)
    options = parser.parse_args()
    for line in overhead(options.rounds) if options.what == "overhead" else leaks(options.trials):
        print(json.dumps(line), flush=True)
