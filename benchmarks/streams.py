"""Seeding the clients' random streams: one by one by NumPy, and together.

    python -m benchmarks.streams [--clients 13 128]

One JSON line each: microseconds a stream, median of turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

from fedsim.randomness import Purpose, numpy_stream, numpy_streams, torch_stream, torch_streams

TURNS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[13, 128])
    for clients in parser.parse_args().clients:
        who = range(clients)
        ways: dict[str, Callable[[], object]] = {
            "numpy, one by one": lambda who=who: [numpy_stream(0, Purpose.BATCHES, 1, client) for client in who],
            "numpy, together": lambda who=who: numpy_streams(0, Purpose.BATCHES, 1, last=who),
            "torch, one by one": lambda who=who: [torch_stream(0, Purpose.BATCHES, 1, client) for client in who],
            "torch, together": lambda who=who: torch_streams(0, Purpose.BATCHES, 1, last=who),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(TURNS):
            for name, seed in ways.items():
                start = time.perf_counter()
                seed()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: round(1e6 * statistics.median(spent) / clients, 1) for name, spent in seconds.items()}
        print(json.dumps({"clients": clients, "us_a_stream": medians}))


if __name__ == "__main__":
    main()
