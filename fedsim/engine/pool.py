"""The worker pool: free workers pull blocks of chunks; what a worker that died had is given to others."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from fedsim.aggregation.pairwise import Block
from fedsim.engine.carriers import Calls, Carrier, LostError
from fedsim.engine.dealing import IN_FLIGHT, Dealer
from fedsim.engine.wires import Wires
from fedsim.errors import RunError

TRIES = 3
"""Workers that a chunk may cost before it is given up."""
RECOVERY_SECONDS = 120.0
"""How long the pool waits when every worker is away."""
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

    def plus(self, others: "Faults") -> "Faults":
        """Return these and others together."""
        return Faults(*map(sum, zip(astuple(self), astuple(others), strict=True)))


@dataclass
class Call:
    """One call of a worker.

    Attributes:
        block: What it does.
        failures: Workers that this block has cost.
        suspect: Its worker died before: it is done alone.
        value: What it returned.
    """

    block: Block
    failures: int = 0
    suspect: bool = False
    value: Any = None


class WorkerPool:
    """Sends calls to whichever worker is free and hands the results back in order."""

    def __init__(
        self,
        workers: Sequence[ActorHandle],
        server: ActorHandle | None = None,
        wires: Wires | None = None,
        recovery_seconds: float = RECOVERY_SECONDS,
    ) -> None:
        """Use `workers`, actors that Ray restarts when they die, and carriers to them and to the server.

        Attributes:
            calls: Carries what no other carrier is named for.
            wires: What can carry rounds of small models, or None.
            faults: What went wrong so far.
            recovery_seconds: How long a call of `deal` waits when every worker is away.
            recovering: By number of a worker that is away: the sign of life that it was asked for.
        """
        self.workers, self.recovery_seconds = list(workers), recovery_seconds
        self.calls, self.wires = Calls(workers, server), wires
        self.faults = Faults()
        self.recovering: dict[int, Any] = {}

    def map(self, method: str, calls: Sequence[tuple[Any, ...]], describe: Callable[[int], str]) -> list[Any]:
        """Run `method` once for each tuple of arguments; return what the calls returned, in call order.

        Args:
            method: Name of a method of the workers.
            calls: Arguments of each call; object references among them are resolved on the worker.
            describe: What the error says of call i when it has cost three workers.

        Raises:
            RunError: If one call has cost three workers, or all workers stay away.
            FedsimError: What a call itself raised.
        """
        ended = self.deal(method, Dealer(len(calls), most=1), lambda block: calls[block.start], describe)
        return [call.value for call in ended]

    def deal(
        self,
        method: str,
        dealer: Dealer,
        arguments: Callable[[Block], tuple[Any, ...]],
        describe: Callable[[int], str],
        *,
        shared: tuple[Any, ...] = (),
        carrier: Carrier | None = None,
    ) -> list[Call]:
        """Run `method` on all numbers of `dealer`, a block a call.

        A worker holds at most two calls. The numbers of a call whose worker died are tried again one by one, alone
        on a worker, so that what kills workers is told from what merely stood behind it. A worker that is away is
        done without until it answers again.

        Args:
            method: Name of a method of the workers.
            dealer: What to do, and in what blocks.
            arguments: Gives the arguments for a block, after the shared ones.
            describe: What the error says of number i when it has cost three workers.
            shared: First arguments of every call.
            carrier: What carries the calls; None: Ray's, which resolve object references among arguments.

        Returns:
            The calls that did it, in the order of their blocks.

        Raises:
            RunError: If one number has cost three workers, or all workers stay away.
            FedsimError: What a call itself raised.
        """
        carrier = carrier or self.calls
        carrier.begin(shared)
        return _Dispatch(self, carrier, method, dealer, arguments, describe).run()

    def lost(self, worker: int) -> None:
        """Count a worker that died, and do without it until it answers again."""
        self.faults.workers_lost += 1
        if self.wires:
            self.wires.drop(worker)  # whoever found it dead
        self.recovering[worker] = self.ping(worker)

    def ping(self, worker: int) -> Any:
        """Ask a worker for a sign of life; return the reference to its answer."""
        return self.workers[worker].pid.remote()


class _Dispatch:
    """One `deal` under way: what waits, what each worker holds, which workers are on their way back."""

    def __init__(
        self,
        pool: "WorkerPool",
        carrier: Carrier,
        method: str,
        dealer: Dealer,
        arguments: Callable[[Block], tuple[Any, ...]],
        describe: Callable[[int], str],
    ) -> None:
        self.pool, self.carrier, self.method, self.dealer = pool, carrier, method, dealer
        self.arguments, self.describe = arguments, describe
        self.suspects: deque[Call] = deque()
        self.held: dict[int, deque[Call]] = {number: deque() for number in range(len(pool.workers))}
        self.recovering = pool.recovering
        self.last_alive = time.monotonic()

    def run(self) -> list[Call]:
        ended: list[Call] = []
        try:
            self._fill()
            while any(self.held.values()) or self.suspects or self.dealer.left:
                call = self._next()
                if call:
                    ended.append(call)
                self._welcome()
                self._fill()
        except BaseException:
            for worker in self.held:  # answers to come would be taken for those to later messages
                self.carrier.drop(worker)
            raise
        return sorted(ended, key=lambda call: call.block)

    def _next(self) -> Call | None:
        """Return a call that has ended; None if its worker died, or it is time to look for those that are away."""
        busy = [worker for worker, held in self.held.items() if held]
        if not busy:
            time.sleep(PING_SECONDS)
            return None
        worker = self.carrier.wait(busy, PING_SECONDS if self.recovering else None)
        if worker is None:
            return None
        try:
            value = self.carrier.receive(worker)
        except LostError:
            self._lost(worker)
            return None
        call = self.held[worker].popleft()
        call.value = value
        return call

    def _fill(self) -> None:
        for depth in range(IN_FLIGHT):
            for worker, held in self.held.items():
                if worker in self.recovering or len(held) > depth or any(call.suspect for call in held):
                    continue
                if self.suspects and not held:
                    self._send(worker, self.suspects.popleft())
                elif block := self.dealer.next(len(self.held) - len(self.recovering)):
                    self._send(worker, Call(block))

    def _send(self, worker: int, call: Call) -> None:
        self.held[worker].append(call)
        try:
            self.carrier.send(worker, self.method, self.arguments(call.block))
        except LostError:
            self._lost(worker)

    def _lost(self, worker: int) -> None:
        """Take back the calls of a worker that died; blame the one that it was at work on."""
        self.carrier.drop(worker)
        self.pool.lost(worker)
        self.last_alive = time.monotonic()  # until now it was not away
        at_work, *behind = self.held[worker]
        self.held[worker].clear()
        at_work.failures += 1
        if at_work.failures >= TRIES:
            what = self.describe(at_work.block.start)
            raise RunError(f"{what} cost {TRIES} workers in a row and was given up")
        for call in (at_work, *behind):
            again = self.dealer.numbers(call.block)
            self.pool.faults.chunks_retried += len(again)
            self.suspects += [Call(Block(number, 1), call.failures, suspect=True) for number in again]

    def _welcome(self) -> None:
        """Use workers again that answer; ask the others once more, and give up when all are away for too long.

        The time is counted anew in each `deal`: what was lost in one simulation is not held against the next.
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
