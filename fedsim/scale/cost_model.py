"""The cost model of a round: what it costs at all, a client, and a call of a worker.

    T = fixed + per_client · clients of the busiest worker + per_call · calls

Local training and the defense's client half run side by side on the workers; drawing the cohort, dealing blocks of
chunks, adding their sums and the server's step do not. Workers beyond the cores share these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from fedsim.engine.dealing import call_count, chunk_count
from fedsim.errors import RunError


@dataclass(frozen=True)
class Point:
    """A round and what it took.

    Attributes:
        clients: Clients a round.
        workers: Workers that ran side by side, at most the number of cores.
        clients_per_chunk: Clients a chunk, at most.
        seconds: Round time.
    """

    clients: int
    workers: int
    clients_per_chunk: int
    seconds: float = 0.0

    @property
    def chunks(self) -> int:
        """Chunks a round."""
        return chunk_count(self.clients, self.clients_per_chunk)

    @property
    def calls(self) -> int:
        """Blocks of chunks, a call of a worker each."""
        return call_count(self.chunks, self.clients_per_chunk, self.workers)

    @property
    def busiest(self) -> float:
        """Clients of the worker that has the most; chunks are of even width."""
        return -(-self.chunks // self.workers) * self.clients / self.chunks


@dataclass(frozen=True)
class CostModel:
    """Seconds a round, and for each client and each call; none is negative."""

    fixed: float
    per_client: float
    per_call: float

    def predict(self, point: Point) -> float:
        """Return the round time in seconds."""
        return self.fixed + self.per_client * point.busiest + self.per_call * point.calls


def fit(points: Sequence[Point]) -> CostModel:
    """Fit the model by non-negative least squares of the relative errors.

    Relative, because sizes span orders of magnitude: absolute errors would be those of the largest size alone.

    Raises:
        RunError: If there are fewer than three different rounds.
    """
    rows = np.array([[1.0, point.busiest, point.calls] for point in points]).reshape(-1, 3)
    if len(np.unique(rows, axis=0)) < 3:
        raise RunError("the cost model has three terms: it needs at least three different rounds")
    seconds = np.array([point.seconds for point in points])
    # Columns of like length: the solver's tolerance is an absolute one.
    relative = rows / seconds[:, None]
    lengths = np.linalg.norm(relative, axis=0)
    solution, _ = nnls(relative / lengths, np.ones(len(points)))
    return CostModel(*(solution / lengths).tolist())


@dataclass(frozen=True)
class HeldOut:
    """How well the other sizes predict one.

    Attributes:
        clients: The size that was held out.
        errors: Predicted / measured − 1 of each of its points.
    """

    clients: int
    errors: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median size of the errors."""
        return float(np.median(np.abs(self.errors)))

    @property
    def worst(self) -> float:
        """The largest error, with its sign."""
        return max(self.errors, key=abs)


def hold_out(points: Sequence[Point]) -> list[HeldOut]:
    """Predict each size from a fit on all others; sizes whose others are too few to fit are left out."""
    found = []
    for size in sorted({point.clients for point in points}):
        own = [point for point in points if point.clients == size]
        try:
            model = fit([point for point in points if point.clients != size])
        except RunError:
            continue
        found.append(HeldOut(size, tuple(model.predict(point) / point.seconds - 1 for point in own)))
    return found


@dataclass(frozen=True)
class Network:
    """What a round moves between machines.

    Attributes:
        weights_bytes: Size of the global weights; they go to each node once.
        partial_bytes: Size of the sum that a call gives.
        bytes_per_second: Rate of the server's link, which carries all of it.
        workers_per_node: Workers a node.
    """

    weights_bytes: float
    partial_bytes: float
    bytes_per_second: float
    workers_per_node: int

    def seconds(self, point: Point) -> float:
        """Return the transfer time of a round, none of it hidden behind the work."""
        nodes = -(-point.workers // self.workers_per_node)
        moved = nodes * self.weights_bytes + point.calls * self.partial_bytes
        return moved / self.bytes_per_second


@dataclass(frozen=True)
class Extrapolation:
    """A predicted round on a cluster."""

    point: Point
    seconds: float
    network_seconds: float
    speed_up: float


def extrapolate(
    model: CostModel, network: Network, clients: int, width: int, workers: Iterable[int]
) -> list[Extrapolation]:
    """Predict a round of `clients` on clusters of so many workers, each with a core of its own.

    The speed-up is over one worker, for which nothing crosses the network.
    """
    alone = model.predict(Point(clients, 1, width))
    found = []
    for count in workers:
        point = Point(clients, count, width)
        moving = network.seconds(point) if count > 1 else 0.0
        seconds = model.predict(point) + moving
        found.append(Extrapolation(point, seconds, moving, alone / seconds))
    return found
