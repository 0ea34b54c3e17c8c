"""The worker pool: free workers pull chunks, and a chunk whose worker died is given to another."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from fedsim.errors import RunError

IN_FLIGHT = 2
"""Calls queued at a worker, so that the next one is there when it ends one."""
TRIES = 3
"""Workers that a call may cost before it is given up."""


@dataclass
class Faults:
    """What went wrong and was repaired."""

    workers_lost: int = 0
    chunks_retried: int = 0
    server_restarts: int = 0

    def since(self, before: "Faults") -> "Faults":
        """Return what was added since `before`."""
        return Faults(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


@dataclass
class _Call:
    index: int
    arguments: tuple[Any, ...]
    failures: int = 0
    references: list[Any] = field(default_factory=list)


class WorkerPool:
    """Sends calls to whichever worker is free and hands the results back in call order."""

    def __init__(self, workers: Sequence[ActorHandle]) -> None:
        """Use `workers`, actors that Ray restarts when they die."""
        self.workers = list(workers)
        self.faults = Faults()

    def map(
        self,
        method: str,
        calls: Sequence[tuple[Any, ...]],
        describe: Callable[[int], str],
        on_result: Callable[[int, Any], None] | None = None,
    ) -> list[list[Any]]:
        """Run `method` once for each tuple of arguments.

        A worker holds at most two calls. A call whose worker died is tried again, alone on a worker, so that
        a call that kills workers is told from one that merely stood in the queue behind it.

        Args:
            method: Name of a method of the workers.
            calls: Arguments of each call; object references among them are resolved on the worker.
            describe: What the error says of call i when it has cost three workers.
            on_result: Called with (i, last return value) as calls end, in any order.

        Returns:
            The object references of each call's return values, in call order.

        Raises:
            RunError: If one call has cost three workers.
        """
        round_ = _Dispatch(self, method, describe)
        return round_.run([_Call(index, arguments) for index, arguments in enumerate(calls)], on_result)


class _Dispatch:
    """One `map` under way: what waits, what each worker holds, what failed once."""

    def __init__(self, pool: "WorkerPool", method: str, describe: Callable[[int], str]) -> None:
        self.pool, self.method, self.describe = pool, method, describe
        self.waiting: deque[_Call] = deque()
        self.suspects: deque[_Call] = deque()
        self.held: dict[int, list[_Call]] = {number: [] for number in range(len(pool.workers))}

    def run(
        self, calls: list[_Call], on_result: Callable[[int, Any], None] | None
    ) -> list[list[Any]]:
        self.waiting.extend(calls)
        remaining = len(calls)
        while remaining:
            self._fill()
            owner = {call.references[-1]: (w, call) for w, held in self.held.items() for call in held}
            ready, _ = ray.wait(list(owner), num_returns=1)
            for reference in ready:
                worker, call = owner[reference]
                try:
                    value = ray.get(reference)
                except RayActorError:
                    self._retry(worker, call)
                    continue
                self.held[worker].remove(call)
                remaining -= 1
                if on_result:
                    on_result(call.index, value)
        return [call.references for call in calls]

    def _fill(self) -> None:
        for depth in range(IN_FLIGHT):
            for worker, held in self.held.items():
                if len(held) > depth or any(call.failures for call in held):
                    continue
                if self.suspects and not held:
                    self._send(worker, self.suspects.popleft())
                elif self.waiting:
                    self._send(worker, self.waiting.popleft())

    def _send(self, worker: int, call: _Call) -> None:
        references = getattr(self.pool.workers[worker], self.method).remote(*call.arguments)
        call.references = references if isinstance(references, list) else [references]
        self.held[worker].append(call)

    def _retry(self, worker: int, call: _Call) -> None:
        first = self.held[worker][0] is call
        self.held[worker].remove(call)
        self.pool.faults.chunks_retried += 1
        self.pool.faults.workers_lost += first
        call.failures += 1
        if call.failures >= TRIES:
            raise RunError(f"{self.describe(call.index)} cost {TRIES} workers in a row and was given up")
        self.suspects.append(call)
