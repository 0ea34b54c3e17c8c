"""What carries messages to workers and server: Ray's calls anywhere, sockets (`wires.py`) on one machine."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from fedsim.errors import FedsimError


class LostError(Exception):
    """The process that was to answer has died."""


class UnusableError(Exception):
    """A carrier cannot reach a process that lives: another one may."""


class Carrier(Protocol):
    """Takes messages to workers, which have numbers, and to the server; a worker answers its messages in order."""

    def begin(self, shared: tuple[Any, ...]) -> None:
        """Set what all later messages to workers share: their first arguments. No worker may be at work."""

    def send(self, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Have a worker run `method`.

        Raises:
            LostError: If it is known to have died; else `receive` will tell.
            UnusableError: If it lives and cannot be reached; nor can it later.
        """

    def wait(self, workers: Sequence[int], timeout: float | None) -> int | None:
        """Return one of these workers, all of them at work, that has an answer; None if the time in s runs out."""

    def receive(self, worker: int) -> Any:
        """Return a worker's next answer.

        Raises:
            LostError: If it died.
            Exception: What the method raised.
        """

    def drop(self, worker: int) -> None:
        """Expect no more answers of a worker."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """Return what `method` of the server returns.

        Raises:
            LostError: If the server died; whether it has run the method is not known then.
            UnusableError: If it lives and cannot be reached.
            Exception: What the method raised.
        """


class Calls:
    """Ray's calls; of a method with several return values all but the last stay where they are, as references."""

    def __init__(self, workers: Sequence[ActorHandle], server: ActorHandle | None = None) -> None:
        """Call these actors."""
        self._workers, self._server = workers, server
        self._shared: tuple[Any, ...] = ()
        self._sent: list[deque[list[Any]]] = [deque() for _ in workers]

    def begin(self, shared: tuple[Any, ...]) -> None:
        """Set the first arguments of calls to come; object references among them are resolved on the worker."""
        self._shared = shared

    def send(self, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Call a worker; object references among the arguments are resolved there."""
        self._sent[worker].append(_call(self._workers[worker], method, (*self._shared, *arguments)))

    def wait(self, workers: Sequence[int], timeout: float | None) -> int | None:
        """Return one of these workers that has an answer, or None."""
        oldest = {self._sent[worker][0][-1]: worker for worker in workers}
        ready, _ = ray.wait(list(oldest), num_returns=1, timeout=timeout)
        return oldest[ready[0]] if ready else None

    def receive(self, worker: int) -> Any:
        """Return a worker's next answer; LostError, too, if the answer was lost with the worker's node."""
        try:
            return _answer(self._sent[worker].popleft())
        except ObjectLostError as error:
            raise LostError from error

    def drop(self, worker: int) -> None:
        """Expect no more answers of a worker."""
        self._sent[worker].clear()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the server.

        Raises:
            LostError: If it died.
            ObjectLostError: If an argument was lost with its node.
        """
        return _answer(_call(self._server, method, arguments))


def _call(actor: ActorHandle, method: str, arguments: tuple[Any, ...]) -> list[Any]:
    references = getattr(actor, method).remote(*arguments)
    return references if isinstance(references, list) else [references]


def _answer(references: list[Any]) -> Any:
    *others, last = references
    try:
        value = fetch(last)
    except RayActorError as error:
        raise LostError from error
    return (*others, value) if others else value


def fetch(reference: Any) -> Any:
    """Return the value behind a reference; an error raised by fedsim on purpose comes without Ray's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, FedsimError):
            raise error.cause from None
        raise
