"""Short rounds by one compiled Ray graph: the same work by the same actors, in messages through shared memory.

Ray's calls take 7 to 11 ms of a round, the graph takes 2 to 5 (`benchmarks/transport.py`). It deals each worker
its share at once, which costs a long round more than it saves, and it ends with the first process that dies. That
round is done again by calls, to the same bits: nothing is kept here.

Source: https://docs.ray.io/en/latest/ray-core/compiled-graph/ray-compiled-graph.html
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedsim.aggregation.pairwise import Block
from fedsim.config import FederationConfig
from fedsim.engine.chunks import ChunkReport, ChunkTask
from fedsim.engine.dealing import even_shares
from fedsim.engine.session import Handle
from fedsim.errors import FedsimError

LEAST_ROUNDS = 64
"""Rounds to come for which a graph is compiled: that takes as long as 50 rounds save."""
MOST_IMAGES = 2048
"""Images that a worker trains on in a round, at most: in a longer round workers drift too far apart."""
MOST_PARAMETERS = 2**18
"""Of a model whose rounds are short: a megabyte a message."""
BREAKS = 3
"""Times that a graph may end before calls do the rest."""


class Part(NamedTuple):
    """Neighbouring chunks of a worker's share: a node of the tree."""

    block: Block
    tasks: tuple[ChunkTask, ...]


@dataclass(frozen=True)
class Order:
    """All that a round's actors need to know, as values: here a reference would not keep its object alive.

    Attributes:
        key: Of the simulation, which all of them hold.
        round: Its number, from 0.
        weights: Global weights, shape [d].
        public: What the defense published for this round.
        shares: What each worker does.
    """

    key: str
    round: int
    weights: NDArray[np.float32]
    public: dict[str, Any]
    shares: tuple[tuple[Part, ...], ...]


class Sum(NamedTuple):
    """What a worker returns of a part: the sum of its chunks, shape [d + b], and a report each."""

    block: Block
    total: NDArray[np.float32]
    reports: tuple[ChunkReport, ...]


class BrokenError(Exception):
    """A graph has ended before its round did.

    Attributes:
        worker: Number of the worker that died; None if it was another process, or Ray does not say which.
        server: Whether it was the server.
    """

    def __init__(self, worker: int | None, server: bool) -> None:
        """Say who died."""
        super().__init__("a process of the compiled graph died")
        self.worker, self.server = worker, server


def is_short(federation: FederationConfig, parameters: int, workers: int) -> bool:
    """Return whether a round is so short that what carries it counts more than who of the workers is late."""
    if federation.local_steps is None:
        return False
    images = federation.clients_per_round * federation.local_steps * federation.batch_size
    return images <= MOST_IMAGES * workers and parameters <= MOST_PARAMETERS


class Circuit:
    """From the driver to all workers, from these to the server, and back; compiled when it is first needed."""

    def __init__(self, workers: Sequence[ActorHandle], server: ActorHandle) -> None:
        """Connect these actors, which must be on the driver's node."""
        self._workers, self._server = list(workers), server
        self._graph: Any = None
        self._held: set[str] = set()
        self._breaks = 0

    def ready(self, handle: Handle, federation: FederationConfig, parameters: int, round_: int) -> bool:
        """Return whether a round can go this way; make it so if that pays for the rounds to come.

        Args:
            handle: The simulation.
            federation: Its settings.
            parameters: Of its model.
            round_: Number of the round.
        """
        pays = self._graph is not None or federation.rounds - round_ >= LEAST_ROUNDS
        if not pays or self._breaks >= BREAKS or not is_short(federation, parameters, len(self._workers)):
            return False
        try:
            if self._graph is None:
                self._graph = self._compile()
            if handle[0] not in self._held:
                ray.get([worker.hold.remote(handle) for worker in self._workers])
                self._held.add(handle[0])
        except RayActorError:  # calls will find out who it was
            self._break()
            return False
        return True

    def _compile(self) -> Any:
        from ray.dag import InputNode

        # It tells of each step and prints a stack for an actor that died, which the engine expects.
        logging.getLogger("ray.dag.compiled_dag_node").setLevel(logging.CRITICAL)
        with InputNode() as order:
            sums = [worker.run_share.bind(order, number) for number, worker in enumerate(self._workers)]
            return self._server.finish_shares.bind(order, *sums).experimental_compile()

    def run(
        self, key: str, weights: NDArray[np.float32], public: dict[str, Any], tasks: Sequence[ChunkTask]
    ) -> Any:
        """Do a round.

        Args:
            key: Of a simulation that is `ready`.
            weights: Global weights, shape [d].
            public: What the defense published for this round.
            tasks: The round's chunks.

        Returns:
            What the server's `finish_shares` returns, in arrays that may be kept.

        Raises:
            BrokenError: If a process died; whether the server has finished the round is not known then.
            FedsimError: What a worker or the server raised; the graph goes on.
        """
        shares = tuple(
            tuple(Part(block, tuple(tasks[block.start : block.start + block.size])) for block in blocks)
            for blocks in even_shares(len(tasks), len(self._workers))
        )
        order = Order(key, tasks[0].round, weights, public, shares)
        try:
            # No time limit: Ray's own would be ten seconds.
            return _owned(ray.get(self._graph.execute(order), timeout=-1))
        except RayTaskError as error:
            if isinstance(error.cause, FedsimError):
                raise error.cause from None
            raise
        except RayError as error:
            self._break()
            raise self._broken(getattr(error, "actor_id", None)) from error
        except BaseException:  # Ctrl-C: an answer is still to come, and would be taken for the next round's
            self.close()
            raise

    def _broken(self, actor: str | None) -> BrokenError:
        ids = [worker._actor_id.hex() for worker in self._workers]
        return BrokenError(ids.index(actor) if actor in ids else None, actor == self._server._actor_id.hex())

    def _break(self) -> None:
        self._breaks += 1
        self.close()

    def close(self) -> None:
        """Let the actors leave the graph, and wait until they have."""
        graph, self._graph = self._graph, None
        self._held.clear()
        if graph is not None:
            graph.teardown()


def _owned(value: Any) -> Any:
    """Copy the arrays in tuples and dictionaries: they lie in a buffer that the next round overwrites."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {name: _owned(item) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [_owned(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
