"""One simulation on the engine: rounds, evaluations, probes and attacks, as calls on the pool and the server."""

import statistics
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError
from torch import Tensor

from fedsim.data.datasets import Dataset
from fedsim.engine.chunks import AttackJob, ChunkReport, ChunkTask
from fedsim.engine.pool import Faults
from fedsim.engine.runtime import Runtime
from fedsim.engine.server import Arrays, RoundOutput, SessionLostError
from fedsim.engine.session import SessionSpec
from fedsim.errors import RunError
from fedsim.privacy.observation import Payload, Reconstruction, Victim

EVALUATION_SHARD = 2000
"""Test images that a worker evaluates at a time; fixed, so that no result depends on the workers."""

SERVER_RESTARTS = 20
"""Times that a simulation survives the death of its parameter server."""


@dataclass(frozen=True)
class RoundRecord:
    """What a round tells the driver.

    Attributes:
        round: Its number, from 0.
        loss: Mean local loss, weighted by examples.
        seconds: From drawing the cohort to the new weights.
        local_seconds: Worker time in local training, summed over workers.
        defense_seconds: Worker time in the defense's client half, summed.
        aggregate_seconds: Server time to add.
        compensate_seconds: Server time in the defense's server half.
        idle_seconds: Mean worker time not spent on local training or defense.
        upload_bytes: Mean bytes that a client sent.
        clients: Clients whose updates counted.
        rejected: Clients whose updates were not finite.
    """

    round: int
    loss: float
    seconds: float
    local_seconds: float
    defense_seconds: float
    aggregate_seconds: float
    compensate_seconds: float
    idle_seconds: float
    upload_bytes: float
    clients: int
    rejected: tuple[int, ...]


class Federation:
    """The clients and the server of one simulation."""

    def __init__(self, spec: SessionSpec, dataset: Dataset, runtime: Runtime, state: Arrays | None = None) -> None:
        """Open the simulation on the server, at its initial weights or at a checkpoint's `state`."""
        self.spec, self.runtime = spec, runtime
        self._test_images = len(dataset.test_labels)
        shared = runtime.put(dataset.fingerprint, dataset)
        self._handle = (uuid.uuid4().hex, [ray.put(spec), shared])
        self._output = self._open(state)
        self._faults_before = replace(runtime.pool.faults)

    @property
    def faults(self) -> Faults:
        """What went wrong and was repaired since this simulation was opened."""
        return self.runtime.pool.faults.since(self._faults_before)

    def weights(self) -> NDArray[np.float32]:
        """Return the global weights, shape [d]."""
        array: NDArray[np.float32] = ray.get(self._output.weights)
        return array

    def state(self) -> Arrays:
        """Return all that the server remembers: what a checkpoint must hold."""
        arrays: Arrays = ray.get(self._output.state)
        return arrays

    def run_round(self, round_: int) -> RoundRecord:
        """Run one round and keep the new weights.

        Raises:
            RunError: If too few clients sent a usable update, or a chunk cost three workers.
        """
        start = time.perf_counter()
        cohort = self.spec.cohort(round_)
        width = self.spec.config.runtime.chunk_width(len(cohort))
        tasks = [ChunkTask(round_, tuple(cohort[at : at + width])) for at in range(0, len(cohort), width)]
        reports: dict[int, ChunkReport] = {}
        returned = self.runtime.pool.map(
            "run_chunk",
            [(self._handle, self._output.weights, self._output.public, task) for task in tasks],
            lambda index: f"round {round_}: the chunk of clients {list(tasks[index].clients)}",
            reports.__setitem__,
        )
        ordered = [reports[index] for index in range(len(tasks))]
        client_weights = tuple(weight for report in ordered for weight in report.client_weights)
        self._check_quorum(round_, len(client_weights), len(cohort))
        server_seconds = self._finish(round_, client_weights, [partial for partial, _ in returned])
        seconds = time.perf_counter() - start
        return self._record(round_, seconds, ordered, client_weights, server_seconds)

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

    def attack(self, payload: Payload, job: AttackJob) -> tuple[Reconstruction, Payload]:
        """Attack the victims of `payload`, taken at the present weights, in shards on all workers.

        Returns:
            What was found, and the payload as the job's strategy saw it.
        """
        shards = self._shards(job)
        calls = [(self._handle, self._output.weights, payload.select(part), job.select(part)) for part in shards]
        parts = self._gather("attack", calls, "an attack")
        return Reconstruction.join([found for found, _ in parts]), Payload.join([seen for _, seen in parts])

    def matching_loss(self, payload: Payload, job: AttackJob, images: Tensor, labels: Tensor) -> Tensor | None:
        """Return the attack's loss at the private images [N, B, C, H, W], shape [N]; None if it has none."""
        calls = [
            (self._handle, self._output.weights, payload.select(p), job.select(p), images[p], labels[p])
            for p in self._shards(job)
        ]
        parts = self._gather("matching_loss", calls, "a matching loss")
        return None if any(part is None for part in parts) else torch.cat(parts)

    def _shards(self, job: AttackJob) -> list[slice]:
        width = self.spec.config.audit.victims_per_shard
        return [slice(at, at + width) for at in range(0, len(job.seeds), width)]

    def close(self) -> None:
        """Let every process drop the simulation."""
        key = self._handle[0]
        self.runtime.server.close.remote(key)
        for worker in self.runtime.pool.workers:
            worker.forget.remote(key)

    def _gather(self, method: str, calls: list[tuple[Any, ...]], what: str) -> list[Any]:
        results: dict[int, Any] = {}
        self.runtime.pool.map(method, calls, lambda index: f"{what} ({index})", results.__setitem__)
        return [results[index] for index in range(len(calls))]

    def _check_quorum(self, round_: int, usable: int, cohort: int) -> None:
        least = self.spec.config.federation.min_clients
        if usable < least:
            raise RunError(
                f"round {round_}: {usable} of {cohort} clients sent a finite update, fewer than "
                f"federation.min_clients ({least}); a lower federation.learning_rate may help"
            )

    def _open(self, state: Any) -> RoundOutput:
        return RoundOutput(*self.runtime.server.open.remote(self._handle, state))

    def _finish(self, round_: int, client_weights: tuple[float, ...], partials: list[Any]) -> dict[str, float]:
        """Let the server finish the round; a server that died is reopened from the round before."""
        while True:
            references = self.runtime.server.finish_round.remote(
                self._handle[0], round_, client_weights, *partials
            )
            try:
                seconds: dict[str, float] = ray.get(references[-1])
            except (RayActorError, SessionLostError):
                self.runtime.pool.faults.server_restarts += 1
                if self.faults.server_restarts > SERVER_RESTARTS:
                    raise RunError(f"round {round_}: the parameter server keeps dying") from None
                self._open(self._output.state)
                continue
            self._output = RoundOutput(*references)
            return seconds

    def _record(
        self,
        round_: int,
        seconds: float,
        reports: list[ChunkReport],
        client_weights: tuple[float, ...],
        server_seconds: dict[str, float],
    ) -> RoundRecord:
        local = sum(report.local_seconds for report in reports)
        defense = sum(report.defense_seconds for report in reports)
        rejected = tuple(client for report in reports for client in report.rejected)
        clients = len(client_weights) + len(rejected)
        return RoundRecord(
            round=round_,
            loss=sum(report.loss for report in reports) / sum(client_weights),
            seconds=seconds,
            local_seconds=local,
            defense_seconds=defense,
            aggregate_seconds=server_seconds["aggregate"],
            compensate_seconds=server_seconds["compensate"],
            idle_seconds=seconds - (local + defense) / len(self.runtime.pool.workers),
            upload_bytes=sum(report.upload_bytes for report in reports) / clients,
            clients=len(client_weights),
            rejected=rejected,
        )


@dataclass(frozen=True)
class Overhead:
    """Round time with a defense over without, from paired rounds.

    Attributes:
        pairs: Number of pairs.
        median: Median of (with / without − 1).
        low: Lower quartile.
        high: Upper quartile.
    """

    pairs: int
    median: float
    low: float
    high: float


def measure_overhead(plain: Federation, defended: Federation, first_round: int, pairs: int) -> Overhead:
    """Time rounds with and without a defense in turn on the same workers, because clocks drift.

    The first pair warms up and does not count; which of the two goes first alternates.
    """
    ratios = []
    for pair in range(pairs + 1):
        order = (plain, defended) if pair % 2 else (defended, plain)
        seconds = {id(one): one.run_round(first_round + pair).seconds for one in order}
        ratios.append(seconds[id(defended)] / seconds[id(plain)] - 1)
    low, median, high = statistics.quantiles(ratios[1:], n=4) if pairs > 1 else ratios[1:] * 3
    return Overhead(pairs, median, low, high)
