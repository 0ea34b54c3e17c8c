"""Wires: sockets by which the driver talks to the actors on its own machine.

Ray starts, places and restarts the processes, and carries what is large or goes far. But between processes that
have slept a call through Ray takes 1 to 5 ms, a message through a socket less than one
(`benchmarks/transport.py`), and a round is three of them one after the other. Nothing is kept here: when a process
dies, the round is done again by calls.
"""

import logging
import pickle
import secrets
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, NamedTuple

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from fedsim.aggregation.pairwise import Block
from fedsim.engine.dealing import IN_FLIGHT, Dealer
from fedsim.engine.session import Handle
from fedsim.errors import FedsimError

log = logging.getLogger(__name__)

MOST_PARAMETERS = 2**18
"""Of a model whose weights go through a socket, a megabyte; larger ones Ray puts into shared memory once."""


class LostError(Exception):
    """A process at the other end died.

    Attributes:
        worker: Its number, or None if it was the server.
    """

    def __init__(self, worker: int | None) -> None:
        """Say who died."""
        super().__init__("the server died" if worker is None else f"worker {worker} died")
        self.worker = worker


class Answer(NamedTuple):
    """What a worker returned for a block."""

    block: Block
    value: Any


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
        with wire:
            while True:
                try:
                    method, arguments = wire.recv()
                    wire.send(_outcome(getattr(self, method), arguments))
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
    """Sockets to all workers of a pool and to the server; connected when they are first needed."""

    def __init__(self, workers: Sequence[ActorHandle], server: ActorHandle) -> None:
        """Connect these actors, which must be on this machine."""
        self._actors = [*workers, server]
        self._ends: list[Connection] = []
        self._held: set[str] = set()
        self._unanswered = 0
        self._refused = False

    def ready(self, handle: Handle, parameters: int) -> bool:
        """Return whether rounds of a simulation can go this way, its model having so many parameters."""
        if self._refused or parameters > MOST_PARAMETERS:
            return False
        try:
            if handle[0] not in self._held:
                ray.get([worker.hold.remote(handle) for worker in self._actors[:-1]])
                self._held.add(handle[0])
            if not self._ends:
                self.connect()
        except (RayActorError, ConnectionError, EOFError):  # one has died: calls will find out who it was
            self.close()
            return False
        except OSError as error:
            log.warning(
                "rounds go by Ray's calls, because sockets do not work here: %s", str(error).splitlines()[-1]
            )
            self._refused = True
            return False
        return True

    def connect(self) -> None:
        """Connect to all of them.

        Raises:
            RayActorError: If one is dead.
            ConnectionError: If one dies meanwhile; or EOFError.
            OSError: If sockets do not work here.
        """
        key = secrets.token_bytes(32)
        # Who is connected does not need the folder any more.
        with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
            paths = [f"{folder}/{number}" for number in range(len(self._actors))]
            ray.get([actor.listen.remote(path, key) for actor, path in zip(self._actors, paths, strict=True)])
            self._ends = [Client(path, "AF_UNIX", authkey=key) for path in paths]

    def deal(self, method: str, dealer: Dealer, arguments: Callable[[Block], tuple[Any, ...]]) -> list[Answer]:
        """Run `method` of the workers on all numbers of `dealer`, a block a message.

        Args:
            method: Name of a method of the workers.
            dealer: What to do, and in what blocks.
            arguments: Gives the arguments for a block.

        Returns:
            What the workers returned, in the order of the blocks.

        Raises:
            LostError: If a worker died.
            Exception: What a worker raised. In either case no worker is at work any more.
        """
        held: dict[int, deque[Block]] = {number: deque() for number in range(len(self._ends) - 1)}
        answers: list[Answer] = []
        failure: Exception | None = None
        with self._hung_up_if_cut():
            while True:
                if not failure:
                    self._fill(held, method, dealer, arguments)
                busy = {self._ends[number]: number for number, blocks in held.items() if blocks}
                if not busy:
                    break
                for number in [busy[end] for end in wait(list(busy))]:  # type: ignore[index]
                    try:
                        answers.append(Answer(held[number].popleft(), self._receive(number)))
                    except LostError as error:
                        held[number].clear()
                        failure = error
                    except Exception as error:
                        failure = failure or error
            if failure:
                raise failure
        return sorted(answers)

    def _fill(
        self,
        held: dict[int, deque[Block]],
        method: str,
        dealer: Dealer,
        arguments: Callable[[Block], tuple[Any, ...]],
    ) -> None:
        for depth in range(IN_FLIGHT):
            for number, blocks in held.items():
                if len(blocks) <= depth and (block := dealer.next(len(held))):
                    self._send(number, method, arguments(block))
                    blocks.append(block)

    def server(self, method: str, *arguments: Any) -> Any:
        """Run `method` of the server.

        Raises:
            LostError: If the server died; whether it has run the method is not known then.
            Exception: What the server raised.
        """
        server = len(self._ends) - 1
        with self._hung_up_if_cut():
            self._send(server, method, arguments)
            return self._receive(server)

    def _send(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        self._unanswered += 1
        with suppress(OSError):  # who has died will not answer
            self._ends[number].send((method, arguments))

    def _receive(self, number: int) -> Any:
        try:
            value, error = self._ends[number].recv()
        except (EOFError, OSError):
            raise LostError(number if number < len(self._ends) - 1 else None) from None
        self._unanswered -= 1
        if error:
            raise error
        return value

    @contextmanager
    def _hung_up_if_cut(self) -> Iterator[None]:
        """Hang up if answers are still to come: they would be taken for those to later messages."""
        try:
            yield
        finally:
            if self._unanswered:
                self.close()

    def close(self) -> None:
        """Hang up; actors that are at work end that first."""
        for end in self._ends:
            end.close()
        self._ends.clear()
        self._held.clear()
        self._unanswered = 0
