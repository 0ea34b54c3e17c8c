"""The worker pool: free workers pull chunks, and a chunk whose worker died is given to another."""

import time
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
RECOVERY_SECONDS = 120
PING_SECONDS = 0.1


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
    suspect: bool = False
    references: list[Any] = field(default_factory=list)


@dataclass
class _Recovery:
    ping: Any
    since: float = field(default_factory=time.monotonic)


class WorkerPool:
    """Sends calls to whichever worker is free and hands the results back in call order."""

    def __init__(self, workers: Sequence[ActorHandle]) -> None:
        """Use `workers`, actors that Ray restarts when they die."""
        self.workers = list(workers)
        self.faults = Faults()
        self.recovering: dict[int, _Recovery] = {}

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
            RunError: If one call has cost three workers, or a worker does not come back.
        """
        dispatch = _Dispatch(self, method, describe)
        return dispatch.run([_Call(index, arguments) for index, arguments in enumerate(calls)], on_result)

    def ping(self, worker: int) -> Any:
        """Ask a worker for a sign of life; return the reference to its answer."""
        return self.workers[worker].pid.remote()


class _Dispatch:
    """One `map` under way: what waits, what each worker holds, which workers are on their way back."""

    def __init__(self, pool: "WorkerPool", method: str, describe: Callable[[int], str]) -> None:
        self.pool, self.method, self.describe = pool, method, describe
        self.waiting: deque[_Call] = deque()
        self.suspects: deque[_Call] = deque()
        self.held: dict[int, list[_Call]] = {number: [] for number in range(len(pool.workers))}
        self.recovering = pool.recovering

    def run(self, calls: list[_Call], on_result: Callable[[int, Any], None] | None) -> list[list[Any]]:
        self.waiting.extend(calls)
        remaining = len(calls)
        while remaining:
            self._fill()
            owner = {call.references[-1]: (w, call) for w, held in self.held.items() for call in held}
            pings = {recovery.ping: worker for worker, recovery in self.recovering.items()}
            ready, _ = ray.wait([*owner, *pings], num_returns=1)
            if ready[0] in pings:
                self._welcome(pings[ready[0]])
                continue
            worker, call = owner[ready[0]]
            try:
                value = ray.get(ready[0])
            except RayActorError:
                self._lost(worker, call)
                continue
            self.held[worker].remove(call)
            remaining -= 1
            if on_result:
                on_result(call.index, value)
        return [call.references for call in calls]

    def _fill(self) -> None:
        for depth in range(IN_FLIGHT):
            for worker, held in self.held.items():
                if worker in self.recovering or len(held) > depth or any(call.suspect for call in held):
                    continue
                if self.suspects and not held:
                    self._send(worker, self.suspects.popleft())
                elif self.waiting:
                    self._send(worker, self.waiting.popleft())

    def _send(self, worker: int, call: _Call) -> None:
        references = getattr(self.pool.workers[worker], self.method).remote(*call.arguments)
        call.references = references if isinstance(references, list) else [references]
        self.held[worker].append(call)

    def _lost(self, worker: int, call: _Call) -> None:
        """Take a call back from a worker that died; blame it only if it was the one being worked on."""
        at_work = self.held[worker][0] is call
        self.held[worker].remove(call)
        self.pool.faults.chunks_retried += 1
        call.suspect = True
        if worker not in self.recovering:
            self.pool.faults.workers_lost += 1
            self.recovering[worker] = _Recovery(self.pool.ping(worker))
            call.failures += at_work
        if call.failures >= TRIES:
            raise RunError(f"{self.describe(call.index)} cost {TRIES} workers in a row and was given up")
        self.suspects.append(call)

    def _welcome(self, worker: int) -> None:
        """Use a worker again if it answers; else ask once more a little later."""
        recovery = self.recovering[worker]
        try:
            ray.get(recovery.ping)
            del self.recovering[worker]
        except RayActorError:
            if time.monotonic() - recovery.since > RECOVERY_SECONDS:
                raise RunError(f"worker {worker} died and did not come back in {RECOVERY_SECONDS} s") from None
            time.sleep(PING_SECONDS)
            recovery.ping = self.pool.ping(worker)
