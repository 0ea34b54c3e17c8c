"""The worker pool: free workers pull chunks, and a chunk whose worker died is given to another."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from fedsim.errors import FedsimError, RunError

IN_FLIGHT = 2
"""Calls queued at a worker, so that the next one is there when it ends one."""
TRIES = 3
"""Workers that a call may cost before it is given up."""
RECOVERY_SECONDS = 120.0
"""How long a map waits when every worker is away."""
PING_SECONDS = 0.1
"""Between two looks at workers that are away."""


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


def fetch(reference: Any) -> Any:
    """Return the value behind a reference; an error raised by fedsim on purpose comes without Ray's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, FedsimError):
            raise error.cause from None
        raise


class WorkerPool:
    """Sends calls to whichever worker is free and hands the results back in call order."""

    def __init__(self, workers: Sequence[ActorHandle], recovery_seconds: float = RECOVERY_SECONDS) -> None:
        """Use `workers`, actors that Ray restarts when they die.

        Attributes:
            faults: What went wrong so far.
            recovery_seconds: How long a `map` waits when every worker is away.
            recovering: By number of a worker that is away: the sign of life that it was asked for.
        """
        self.workers, self.recovery_seconds = list(workers), recovery_seconds
        self.faults = Faults()
        self.recovering: dict[int, Any] = {}

    def map(
        self,
        method: str,
        calls: Sequence[tuple[Any, ...]],
        describe: Callable[[int], str],
        on_result: Callable[[int, Any], None] | None = None,
    ) -> list[list[Any]]:
        """Run `method` once for each tuple of arguments.

        A worker holds at most two calls. A call whose worker died is tried again, alone on a worker, so that
        a call that kills workers is told from one that merely stood in the queue behind it. A worker that is away
        is done without until it answers again.

        Args:
            method: Name of a method of the workers.
            calls: Arguments of each call; object references among them are resolved on the worker.
            describe: What the error says of call i when it has cost three workers.
            on_result: Called with (i, last return value) as calls end, in any order.

        Returns:
            The object references of each call's return values, in call order.

        Raises:
            RunError: If one call has cost three workers, or all workers stay away.
            FedsimError: What a call itself raised.
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
        self.last_alive = time.monotonic()

    def run(self, calls: list[_Call], on_result: Callable[[int, Any], None] | None) -> list[list[Any]]:
        self.waiting.extend(calls)
        remaining = len(calls)
        while remaining:
            self._welcome()
            self._fill()
            ended = self._next()
            if ended is None:
                continue
            worker, call = ended
            try:
                value = fetch(call.references[-1])
            except (RayActorError, ObjectLostError):
                self._lost(worker, call)
                continue
            self.held[worker].remove(call)
            remaining -= 1
            if on_result:
                on_result(call.index, value)
        return [call.references for call in calls]

    def _next(self) -> tuple[int, _Call] | None:
        """Return a call that has ended, and its worker; None if it is time to look for workers that are away."""
        owner = {call.references[-1]: (worker, call) for worker, held in self.held.items() for call in held}
        if not owner:
            time.sleep(PING_SECONDS)
            return None
        ready, _ = ray.wait(list(owner), num_returns=1, timeout=PING_SECONDS if self.recovering else None)
        return owner[ready[0]] if ready else None

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
            self.recovering[worker] = self.pool.ping(worker)
            call.failures += at_work
        if call.failures >= TRIES:
            raise RunError(f"{self.describe(call.index)} cost {TRIES} workers in a row and was given up")
        self.suspects.append(call)

    def _welcome(self) -> None:
        """Use workers again that answer; ask the others once more, and give up when all are away for too long.

        The time is counted anew in each map: what was lost in one simulation is not held against the next.
        """
        for worker, ping in list(self.recovering.items()):
            if not ray.wait([ping], timeout=0)[0]:
                continue
            try:
                ray.get(ping)
                del self.recovering[worker]
            except RayActorError:
                self.recovering[worker] = self.pool.ping(worker)
        now, limit = time.monotonic(), self.pool.recovery_seconds
        if len(self.recovering) < len(self.pool.workers):
            self.last_alive = now
        elif now - self.last_alive > limit:
            raise RunError(f"all {len(self.pool.workers)} workers died and none came back in {limit:g} s")
