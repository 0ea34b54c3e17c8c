"""Wires: sockets by which the driver talks to the actors on its own machine.

Ray starts, places and restarts the processes, and carries what is large or goes far. But between processes that
have slept a call through Ray takes 1 to 5 ms, a message through a socket less than one
(`benchmarks/transport.py`), and a round is three of them one after the other.
"""

import logging
import pickle
import secrets
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from fedsim.engine.carriers import LostError, UnusableError
from fedsim.engine.scratch import Scratch
from fedsim.engine.session import Handle
from fedsim.errors import FedsimError

log = logging.getLogger(__name__)

MOST_PARAMETERS = 2**18
"""Of a model whose weights go through a socket, a megabyte; larger ones Ray puts into shared memory once."""
MOST_CLIENTS = 64
"""Of a chunk. The message that names a block's clients must fit into a socket's buffer (8 KiB on some systems), as
it goes to a worker that may just be sending an answer: that would wait for the driver, and the driver for it."""


class Answering:
    """An actor that answers wires: it calls the method that a message names, and sends back what that returned."""

    def listen(self, path: str, key: bytes) -> None:
        """Wait for one connection to a socket at `path`, by whoever knows `key`, in a thread of its own."""
        listener = Listener(path, "AF_UNIX", authkey=key)
        threading.Thread(target=self._answer, args=[listener], daemon=True).start()

    def _answer(self, listener: Listener) -> None:
        torch.set_num_threads(1)  # it is each thread's own setting
        wire = listener.accept()
        with suppress(FileNotFoundError):  # the driver removes the socket, too
            listener.close()
        shared: tuple[Any, ...] = ()
        with wire:
            while True:
                try:
                    method, arguments = wire.recv()
                    if method:
                        wire.send(_outcome(getattr(self, method), (*shared, *arguments)))
                    else:
                        shared = arguments
                except (EOFError, OSError):  # the driver has hung up
                    return


def _outcome(method: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    try:
        return method(*arguments), None
    except FedsimError as error:
        return None, error
    except Exception as error:
        portable = _portable(error)
        portable.add_note(f"where it was raised:\n{traceback.format_exc()}")
        return None, portable


def _portable(error: Exception) -> Exception:
    """Return an error that another process can read: not every user's class can."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


class Wires:
    """A `Carrier`: sockets to all workers of a pool and to the server, connected when they are first needed."""

    def __init__(self, workers: Sequence[ActorHandle], server: ActorHandle) -> None:
        """Connect these actors, which must be on this machine."""
        self._actors = [*workers, server]
        self._server = len(workers)
        self._ends: dict[int, Connection] = {}
        self._simulation: Handle | None = None
        self._held: dict[int, set[str]] = {number: set() for number in range(len(workers))}
        self._shared: tuple[Any, ...] = ()
        self._told: set[int] = set()
        self._refused = False

    def connect(self, simulation: Handle | None = None, away: Collection[int] = ()) -> bool:
        """Connect to all that are not connected; return whether sockets work here.

        Args:
            simulation: What the workers open, because a wire carries no references.
            away: Workers not to wait for; a message to one will connect it.
        """
        self._simulation = simulation
        with suppress(UnusableError):
            self._connect(number for number in range(len(self._actors)) if number not in away)
        return not self._refused

    def _connect(self, numbers: Iterable[int]) -> None:
        """Connect those of `numbers` that are alive, and let them open the simulation.

        Raises:
            UnusableError: If sockets do not work here, now and for good.
        """
        missing = [number for number in numbers if not self._ready(number)]
        if not missing:
            return
        try:
            if not self._refused:
                self._open(missing)
        except OSError as error:
            log.warning(
                "rounds go by Ray's calls, because sockets do not work here: %s", str(error).splitlines()[-1]
            )
            self._refused = True
            self.close()
        if self._refused:
            raise UnusableError

    def _open(self, missing: Sequence[int]) -> None:
        key = secrets.token_bytes(32)
        # Who is connected does not need the folder any more.
        with closing(Scratch()) as scratch:
            paths = {number: str(scratch.path / f"{number}") for number in missing}
            started = {number: self._start(number, path, key) for number, path in paths.items()}
            for number, references in started.items():
                with suppress(RayActorError, ConnectionError, EOFError):  # it has died: messages will find out
                    ray.get(references)
                    if number not in self._ends:
                        self._ends[number] = Client(paths[number], "AF_UNIX", authkey=key)
                    if self._simulation and number != self._server:
                        self._held[number].add(self._simulation[0])

    def _ready(self, number: int) -> bool:
        holds = number == self._server or not self._simulation or self._simulation[0] in self._held[number]
        return holds and number in self._ends

    def _start(self, number: int, path: str, key: bytes) -> list[Any]:
        actor, started = self._actors[number], []
        if number not in self._ends:
            started.append(actor.listen.remote(path, key))
        if self._simulation and number != self._server:
            started.append(actor.hold.remote(self._simulation))
        return started

    def begin(self, shared: tuple[Any, ...]) -> None:
        """Set the first arguments of messages to come; they go to each worker once, before its first message."""
        self._shared = shared
        self._told.clear()

    def send(self, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Have a worker run `method`; see `Carrier`."""
        end = self._end(worker)
        with suppress(OSError):  # who has died will not answer
            if worker not in self._told:
                self._told.add(worker)
                end.send((None, self._shared))
            end.send((method, arguments))

    def _end(self, number: int) -> Connection:
        if number not in self._ends:
            self._connect([number])
        if number not in self._ends:
            raise LostError
        return self._ends[number]

    def wait(self, workers: Sequence[int], timeout: float | None) -> int | None:
        """Return one of these workers that has an answer, or None."""
        ends = {self._ends[worker]: worker for worker in workers}
        ready = wait(list(ends), timeout)
        return ends[ready[0]] if ready else None  # type: ignore[index]

    def receive(self, worker: int) -> Any:
        """Return a worker's next answer; see `Carrier`."""
        try:
            value, error = self._ends[worker].recv()
        except (EOFError, OSError):
            raise LostError from None
        if error:
            raise error
        return value

    def drop(self, worker: int) -> None:
        """Hang up; a worker that is at work ends that first."""
        if worker in self._ends:
            self._ends.pop(worker).close()
        self._told.discard(worker)
        if worker != self._server:
            self._held[worker].clear()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Have the server run `method`; see `Carrier`."""
        end = self._end(self._server)
        try:
            with suppress(OSError):  # if it has died it will not answer
                end.send((method, arguments))
            return self.receive(self._server)
        except BaseException:
            # Perhaps its answer is still to come: it would be taken for that to a later message.
            self.drop(self._server)
            raise

    def close(self) -> None:
        """Hang up everywhere."""
        for number in list(self._ends):
            self.drop(number)
