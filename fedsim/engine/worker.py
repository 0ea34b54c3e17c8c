"""The worker actor: one process that hosts as many clients as its chunk is wide."""

import os
import threading
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.public import PublicImages
from fedsim.engine import chunks, lessons, probes
from fedsim.engine.chunks import AttackJob, ChunkReport, ChunkTask
from fedsim.engine.lessons import Lesson
from fedsim.engine.process import start_process
from fedsim.engine.session import Handle, Session
from fedsim.engine.wires import Answering
from fedsim.learning.batches import as_tensor
from fedsim.privacy.observation import Payload, Reconstruction, Victim

Array = NDArray[np.float32]


class ClientWorker(Answering):
    """Hosts clients: trains, protects and sums them; also evaluates, probes and attacks."""

    def __init__(self, sys_path: list[str], deterministic: bool = False) -> None:
        """Start on the GPU that Ray gave this actor, or on one CPU thread; see `start_process`."""
        start_process(sys_path, deterministic)
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 0)
        if 0 < share < 1:
            # Its own part of the memory: else one worker's cache could leave the others of this GPU none.
            torch.cuda.set_per_process_memory_fraction(share)
        self._sessions: dict[str, Session] = {}
        # A wire that the driver has hung up may still be at work when a call comes, on the same model.
        self._training = threading.Lock()

    def pid(self) -> int:
        """Return this process's id, once it is up."""
        return os.getpid()

    def forget(self, key: str) -> None:
        """Drop a session."""
        self._sessions.pop(key, None)

    @ray.method(num_returns=2)  # type: ignore[untyped-decorator]
    def run_chunks(
        self, handle: Handle, weights: Array, public: dict[str, Any], tasks: tuple[ChunkTask, ...], first: int
    ) -> tuple[Array, tuple[ChunkReport, ...]]:
        """See `chunks.run_chunks`; two return values, so that the sum [d + b] need not pass the driver."""
        session, arguments = self._session(handle), (self._tensor(weights), self._tensors(public), tasks, first)
        with self._training:
            total, reports = chunks.run_chunks(session, *arguments)
        return total.cpu().numpy(), reports

    def hold(self, handle: Handle) -> None:
        """Open a simulation; through a wire, which carries no references, only its key comes."""
        self._session(handle)

    def probe(
        self, handle: Handle, weights: Array, public: dict[str, Any], round_: int, victims: tuple[Victim, ...]
    ) -> Payload:
        """See `probes.probe`."""
        session = self._session(handle)
        return probes.probe(session, self._tensor(weights), self._tensors(public), round_, victims)

    def evaluate(
        self, handle: Handle, weights: Array, statistics: Array, start: int, stop: int
    ) -> tuple[int, float]:
        """See `chunks.evaluate`."""
        session = self._session(handle)
        return chunks.evaluate(session, self._tensor(weights), self._tensor(statistics), start, stop)

    def learn(
        self,
        handle: Handle,
        weights: Array,
        public: dict[str, Any],
        images: PublicImages,
        job: AttackJob,
        round_: int,
    ) -> Lesson:
        """See `lessons.learn`."""
        session = self._session(handle)
        return lessons.learn(session, self._tensor(weights), self._tensors(public), images, job, round_)

    def attack(
        self, handle: Handle, weights: Array, payload: Payload, job: AttackJob, learned: Any = None
    ) -> tuple[Reconstruction, Payload]:
        """See `chunks.attack`."""
        return chunks.attack(self._session(handle), self._tensor(weights), payload, job, learned)

    def matching_loss(
        self,
        handle: Handle,
        weights: Array,
        payload: Payload,
        job: AttackJob,
        images: Tensor,
        labels: Tensor,
        learned: Any = None,
    ) -> Tensor | None:
        """See `chunks.matching_loss`."""
        session = self._session(handle)
        return chunks.matching_loss(session, self._tensor(weights), payload, job, images, labels, learned)

    def _session(self, handle: Handle) -> Session:
        key, references = handle
        if key not in self._sessions:
            spec, dataset = ray.get(references)
            self._sessions[key] = Session(spec, dataset, self._device)
        return self._sessions[key]

    def _tensor(self, array: Array) -> Tensor:
        return as_tensor(array, self._device)

    def _tensors(self, arrays: dict[str, Any]) -> dict[str, Tensor]:
        return {name: as_tensor(array, self._device) for name, array in arrays.items()}
