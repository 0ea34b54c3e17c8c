"""One simulation on the engine: rounds, evaluations, probes and attacks, as calls on the pool and the server."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayActorError
from torch import Tensor

from fedsim.data.datasets import Dataset
from fedsim.data.public import PublicImages
from fedsim.engine.carriers import Carrier, LostError, UnusableError, fetch
from fedsim.engine.chunks import AttackJob, ChunkReport, ChunkTask
from fedsim.engine.dealing import Dealer, split_evenly
from fedsim.engine.lessons import Lesson, Scope, shared_key
from fedsim.engine.pool import PING_SECONDS, TRIES, Call, Faults
from fedsim.engine.rounds import Round, RoundRecord
from fedsim.engine.runtime import Runtime
from fedsim.engine.server import Arrays, RoundOutput, SessionLostError
from fedsim.engine.session import SessionSpec
from fedsim.engine.wires import MOST_CLIENTS, MOST_PARAMETERS
from fedsim.errors import RunError
from fedsim.learning.execution import Execution
from fedsim.privacy.observation import Payload, Reconstruction, Victim

EVALUATION_SHARD = 1000
"""Test images that a worker evaluates at a time; fixed, so that no result depends on the workers."""

SERVER_RESTARTS = 20
"""Times that a simulation survives the death of its parameter server."""


class Federation:
    """The clients and the server of one simulation."""

    def __init__(
        self,
        spec: SessionSpec,
        dataset: Dataset,
        runtime: Runtime,
        state: Arrays | None = None,
        rounds_done: int = 0,
    ) -> None:
        """Open the simulation on the server, at its initial weights or at a checkpoint's `state`.

        Attributes:
            rounds_done: Rounds behind the present weights.
            rounds_by_wire: Rounds that wires carried.
        """
        self.spec, self.runtime, self.rounds_done = spec, runtime, rounds_done
        self.rounds_by_wire = 0
        self._test_images = len(dataset.test_labels)
        shared = runtime.put(dataset.fingerprint, dataset)
        self._handle = (uuid.uuid4().hex, [ray.put(spec), shared])
        self._faults_before = replace(runtime.pool.faults)
        self._output = self._open(state)
        self._parameters = len(self.weights())

    @property
    def faults(self) -> Faults:
        """What went wrong and was repaired since this simulation was opened."""
        return self.runtime.pool.faults.since(self._faults_before)

    @property
    def execution(self) -> Execution:
        """How the clients of a chunk are trained."""
        return self.spec.config.execution(self.runtime.device)

    def weights(self) -> NDArray[np.float32]:
        """Return the global weights, shape [d]."""
        array: NDArray[np.float32] = _value(self._output.weights)
        return array

    def state(self) -> Arrays:
        """Return all that the server remembers: what a checkpoint must hold."""
        arrays: Arrays = _value(self._output.state)
        return arrays

    def run_round(self, round_: int) -> RoundRecord:
        """Run one round and keep the new weights.

        Raises:
            RunError: If too few clients sent a usable update, or a chunk cost three workers.
        """
        this = Round(round_, self.spec)
        this.check_quorum([])
        width = self.spec.config.chunk_width(self.spec.config.federation.clients_per_round, self.runtime.device)
        tasks = [ChunkTask(round_, part) for part in split_evenly(this.who.clients, width)]
        carrier = self._carrier(width)
        for _ in range(TRIES):
            try:
                calls = self._compute(this, tasks, width, carrier)
            except UnusableError:
                carrier = self.runtime.pool.calls
                continue
            reports = [report for call in calls for report in call.value[1]]
            this.check_quorum(reports)
            try:
                seconds = self._finish(this.number, reports, calls, carrier)
            except ObjectLostError:
                # Sums went with their node before the server had them: only the clients can make them again.
                self.runtime.pool.faults.chunks_retried += len(reports)
            else:
                self.rounds_by_wire += carrier is self.runtime.pool.wires
                return this.record(reports, seconds, len(self.runtime.pool.workers))
        raise RunError(f"round {this.number}: {TRIES} times in a row a node was lost with its clients' updates")

    def _carrier(self, width: int) -> Carrier:
        """Return what carries a round of chunks of `width` clients."""
        pool = self.runtime.pool
        small = self._parameters <= MOST_PARAMETERS and width <= MOST_CLIENTS
        if pool.wires and small and pool.wires.connect(self._handle, pool.recovering):
            return pool.wires
        return pool.calls

    def _compute(self, this: Round, tasks: list[ChunkTask], width: int, carrier: Carrier) -> list[Call]:
        """Let the workers train the clients; return the calls that did it: a sum and the chunks' reports each."""
        shared: tuple[Any, ...] = (self._handle, self._output.weights, self._output.public)
        if carrier is self.runtime.pool.wires:  # it carries no references
            shared = ((self._handle[0], []), self.weights(), _value(self._output.public))
        return self.runtime.pool.deal(
            "run_chunks",
            Dealer(len(tasks), width),
            lambda block: (tuple(tasks[block.start : block.start + block.size]), block.start),
            lambda index: f"round {this.number}: the chunk of clients {list(tasks[index].clients)}",
            shared=shared,
            carrier=carrier,
        )

    def has_quorum(self, round_: int) -> bool:
        """Return whether enough clients report back in a round."""
        return len(self.spec.participation(round_).clients) >= self.spec.config.federation.min_clients

    def evaluate(self) -> tuple[float, float]:
        """Return accuracy (0–1) and mean loss of the global weights on the test set."""
        total = self._test_images
        shards = [(at, min(total, at + EVALUATION_SHARD)) for at in range(0, total, EVALUATION_SHARD)]
        calls = [(self._handle, self._output.weights, self._output.statistics, *shard) for shard in shards]
        parts = self._gather("evaluate", calls, "an evaluation")
        return sum(right for right, _ in parts) / total, sum(loss for _, loss in parts) / total

    def probe(self, round_: int, victims: tuple[Victim, ...]) -> Payload:
        """Return what victims send at the present weights."""
        calls = [(self._handle, self._output.weights, self._output.public, round_, victims)]
        payload: Payload = self._gather("probe", calls, "a probe")[0]
        return payload

    def learn(self, wanted: Sequence[tuple[AttackJob, PublicImages]], round_: int) -> list[tuple[Any, float, str]]:
        """Let attacks learn from public images at the present weights, side by side, once for all their victims.

        What is not learned through the defense is the same under any: it is kept for other simulations.

        Args:
            wanted: Whose attack learns, and from which images.
            round_: The round before which it does.

        Returns:
            For each a reference to what it has learned, for `attack`; the seconds that it took now, 0 if it was
            kept; and a line on it, or "".
        """
        kept = self.runtime.lessons
        keys = [self._shared_key(job, images, round_) for job, images in wanted]
        learned = {at: (*kept[key], 0.0) for at, key in enumerate(keys) if key in kept}
        missing = [at for at in range(len(wanted)) if at not in learned]
        calls = [
            (self._handle, self._output.weights, self._output.public, self._stored(images), job, round_)
            for job, images in (wanted[at] for at in missing)
        ]
        lessons: list[Lesson] = self._gather("learn", calls, "an attack's learning")
        for at, lesson in zip(missing, lessons, strict=True):
            # Owned by the driver, so that it outlives the worker that made it.
            learned[at] = ray.put(lesson.learned), lesson.report, lesson.seconds
            if key := keys[at]:
                kept[key] = learned[at][:2]
        return [(reference, seconds, report) for _, (reference, report, seconds) in sorted(learned.items())]

    def _shared_key(self, job: AttackJob, images: PublicImages, round_: int) -> str:
        """Return under what a lesson is kept; "" for one that was learned through the defense."""
        if Scope.of(self.spec.config, job).simulates:
            return ""
        return shared_key(self.spec.config, self.weights(), images, job, round_)

    def _stored(self, images: PublicImages) -> Any:
        return self.runtime.put(images.fingerprint, images)

    def attack(self, payload: Payload, job: AttackJob, learned: Any = None) -> tuple[Reconstruction, Payload]:
        """Attack the victims of `payload`, taken at the present weights, in shards on all workers.

        An attack that learns gets what `learn` returned for the job.

        Returns:
            What was found, and the payload as the job's strategy saw it.
        """
        shards = self._shards(job)
        calls = [
            (self._handle, self._output.weights, payload.select(part), job.select(part), learned)
            for part in shards
        ]
        parts = self._gather("attack", calls, "an attack")
        return Reconstruction.join([found for found, _ in parts]), Payload.join([seen for _, seen in parts])

    def matching_loss(
        self, payload: Payload, job: AttackJob, images: Tensor, labels: Tensor, learned: Any = None
    ) -> Tensor | None:
        """Return the attack's loss at the private images [N, B, C, H, W], shape [N]; None if it has none."""
        calls = [
            (self._handle, self._output.weights, payload.select(p), job.select(p), images[p], labels[p], learned)
            for p in self._shards(job)
        ]
        parts = self._gather("matching_loss", calls, "a matching loss")
        return None if any(part is None for part in parts) else torch.cat(parts)

    def _shards(self, job: AttackJob) -> list[slice]:
        width = self.spec.config.shard_width(self.runtime.device)
        return [slice(at, at + width) for at in range(0, len(job.seeds), width)]

    def close(self) -> None:
        """Let every process drop the simulation."""
        key = self._handle[0]
        self.runtime.server.close.remote(key)
        for worker in self.runtime.pool.workers:
            worker.forget.remote(key)

    def _gather(self, method: str, calls: list[tuple[Any, ...]], what: str) -> list[Any]:
        return self.runtime.pool.map(method, calls, lambda index: f"{what} ({index})")

    def _open(self, state: Any) -> RoundOutput:
        """Open the simulation on the server, waiting for a server that is on its way back."""
        start, limit = time.monotonic(), self.runtime.pool.recovery_seconds
        while True:
            output = RoundOutput(*self.runtime.server.open.remote(self._handle, state))
            try:
                fetch(output.seconds)
                return output
            except RayActorError:
                if time.monotonic() - start > limit:
                    raise RunError(f"the parameter server died and did not come back in {limit:g} s") from None
                time.sleep(PING_SECONDS)

    def _finish(
        self, round_: int, reports: list[ChunkReport], calls: list[Call], carrier: Carrier
    ) -> dict[str, float]:
        """Let the server finish the round; a server that died is reopened from the round before."""
        client_weights = tuple(weight for report in reports for weight in report.client_weights)
        blocks, sums = tuple(call.block for call in calls), [call.value[0] for call in calls]
        while True:
            try:
                output = RoundOutput(
                    *carrier.ask("finish_round", self._handle[0], round_, client_weights, blocks, *sums)
                )
            except UnusableError:
                carrier = self.runtime.pool.calls
            except (LostError, SessionLostError):
                self.runtime.pool.faults.server_restarts += 1
                if self.faults.server_restarts > SERVER_RESTARTS:
                    raise RunError(f"round {round_}: the parameter server keeps dying") from None
                self._open(self._output.state)
                carrier = self.runtime.pool.calls  # which work wherever the new process is
            else:
                self._keep(output)
                return output.seconds

    def _keep(self, output: RoundOutput) -> None:
        # In this order: an interruption in between then leaves a count that fits no history.
        self.rounds_done += 1
        self._output = output


def _value(item: Any) -> Any:
    """Return what a round left: calls leave references, wires the values themselves."""
    return ray.get(item) if isinstance(item, ray.ObjectRef) else item
