"""The parameter-server actor: adds, compensates, steps, and keeps what a checkpoint needs."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.aggregation.pairwise import Block, PairwiseSum
from fedsim.aggregation.plain import PlainAggregation
from fedsim.data.datasets import Dataset
from fedsim.defenses.base import PublicContext, ServerContext
from fedsim.engine.process import start_process
from fedsim.engine.session import Handle, SessionSpec
from fedsim.engine.wires import Answering
from fedsim.errors import RunError
from fedsim.learning import batch_norm
from fedsim.learning.batches import ImageStore, as_tensor
from fedsim.learning.server_optimizers import ServerOptimizer
from fedsim.randomness import Purpose, torch_stream

Arrays = dict[str, NDArray[Any]]
STATISTICS_DECAY = 0.9
"""Share that the server's batch-norm averages keep each round."""


class RoundOutput(NamedTuple):
    """What a round leaves; as return values of an actor they are five object references.

    Attributes:
        weights: Global weights, shape [d].
        statistics: Batch-norm averages, shape [b].
        public: What the defense publishes for the next round.
        state: All that the server remembers, by name.
        seconds: Time to aggregate, to compensate (with preparation), and to step.
    """

    weights: NDArray[np.float32]
    statistics: NDArray[np.float32]
    public: Arrays
    state: Arrays
    seconds: dict[str, float]


@dataclass
class ServerSession:
    """The server's half of one simulation; no Ray here."""

    spec: SessionSpec
    dataset: Dataset

    def __post_init__(self) -> None:
        """Build the model at its initial weights, the defense and the optimiser."""
        config = self.spec.config
        self.model = self.spec.build_model(self.dataset)
        self.model.module.train()
        self.defense = config.defense.build()
        self.aggregation = PlainAggregation()
        self.optimizer = ServerOptimizer(config.federation.server, self.model.initial_weights())
        self.statistics = batch_norm.averages(self.model.module)
        self.public: dict[str, Tensor] = {}

    def prepare(self, round_: int) -> None:
        """Let the defense publish what it needs for `round_`, when it is due."""
        refresh = self.defense.refresh_rounds
        if round_ and not (refresh and round_ % refresh == 0):
            return
        config = self.spec.config
        data = ImageStore.of(self.dataset.train_images, self.dataset.train_labels, "cpu")
        images, labels = data.take(self.spec.root)
        generator = torch_stream(config.seed, Purpose.PREPARATION, round_)
        context = PublicContext(self.model, self.optimizer.weights, images, labels, generator)
        self.public = dict(self.defense.prepare(context))

    def finish(
        self,
        round_: int,
        client_weights: tuple[float, ...],
        blocks: tuple[Block, ...],
        partials: tuple[Any, ...],
    ) -> RoundOutput:
        """Aggregate the blocks' sums [d + b], in order, and move the weights.

        Raises:
            RunError: If the aggregate, before or after compensation, or the new weights are not finite.
        """
        start = time.perf_counter()
        weights = torch.tensor(client_weights, dtype=torch.float64)
        total = PairwiseSum(self.aggregation)
        for block, partial in zip(blocks, partials, strict=True):
            total.push(block, as_tensor(partial))
        mean = total.total() / weights.sum().item()
        _check_finite(round_, mean, "each client's update is finite, but their sum is not")
        update, statistics = mean.split([self.model.layout.dimension, len(self.statistics)])
        aggregated = time.perf_counter()
        shares = (weights / weights.sum()).float()
        context = ServerContext(self.model, shares, round_, self.public)
        update = self.defense.compensate(update, context)
        _check_finite(round_, update, "what the defense's compensate returned is not finite")
        compensated = time.perf_counter()
        federation = self.spec.config.federation
        rate = federation.server.rate(round_, federation.rounds)
        self.optimizer.step(federation.learning_rate * update, rate)
        _check_finite(round_, self.optimizer.weights, "the server's step left weights that are not finite")
        keep = STATISTICS_DECAY if round_ else 0.0
        self.statistics = keep * self.statistics + (1 - keep) * statistics
        self.prepare(round_ + 1)
        stepped = time.perf_counter()
        seconds = {
            "aggregate": aggregated - start,
            "compensate": compensated - aggregated,
            "step": stepped - compensated,
        }
        return self.output(seconds)

    def output(self, seconds: dict[str, float]) -> RoundOutput:
        """Return the present state of the simulation."""
        weights, statistics = self.optimizer.weights.numpy(), self.statistics.numpy()
        public = {name: tensor.numpy() for name, tensor in self.public.items()}
        return RoundOutput(weights, statistics, public, self.state(), seconds)

    def state(self) -> Arrays:
        """Return all that the server remembers, as named arrays."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "optimizer": self.optimizer.state_dict(),
            "defense": self.defense.state_dict(),
            "public": self.public,
        }
        named = {f"{part}/{name}": t.numpy() for part, state in parts.items() for name, t in state.items()}
        return {**named, "statistics": self.statistics.numpy()}

    def restore(self, state: Arrays) -> None:
        """Go back to what `state` returned."""
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "defense": {}, "public": {}}
        for name, array in state.items():
            part, _, rest = name.partition("/")
            if rest:
                parts[part][rest] = torch.from_numpy(array.copy())
        self.optimizer.load_state_dict(parts["optimizer"])
        self.defense.load_state_dict(parts["defense"])
        self.public = parts["public"]
        self.statistics = torch.from_numpy(state["statistics"].copy())


def _check_finite(round_: int, values: Tensor, otherwise: str) -> None:
    """Stop before weights that are lost would blame the clients of the next round.

    Raises:
        RunError: If not all of `values` are finite, with what is `otherwise` the case.
    """
    if not values.isfinite().all():
        raise RunError(f"round {round_}: {otherwise}")


class SessionLostError(RunError):
    """The parameter-server process was restarted and no longer holds the simulation."""


class ParameterServer(Answering):
    """Holds the server's half of every open simulation."""

    def __init__(self, sys_path: list[str]) -> None:
        """Start on one CPU thread; `sys_path` finds users' modules."""
        start_process(sys_path)
        self._sessions: dict[str, ServerSession] = {}

    def pid(self) -> int:
        """Return this process's id."""
        return os.getpid()

    @ray.method(num_returns=5)  # type: ignore[untyped-decorator]
    def open(self, handle: Handle, state: Arrays | None) -> RoundOutput:
        """Start a simulation, or put it back to `state`; return what round 0 (or the next one) starts from."""
        key, references = handle
        session = ServerSession(*ray.get(references))
        if state is None:
            session.prepare(0)
        else:
            session.restore(state)
        self._sessions[key] = session
        return session.output({})

    @ray.method(num_returns=5)  # type: ignore[untyped-decorator]
    def finish_round(
        self,
        key: str,
        round_: int,
        client_weights: tuple[float, ...],
        blocks: tuple[Block, ...],
        *partials: Any,
    ) -> RoundOutput:
        """See `ServerSession.finish`.

        Raises:
            SessionLostError: If this process was restarted: open the simulation again.
        """
        if key not in self._sessions:
            raise SessionLostError(f"the parameter server does not hold simulation {key}")
        return self._sessions[key].finish(round_, client_weights, blocks, partials)

    def close(self, key: str) -> None:
        """Drop a simulation."""
        self._sessions.pop(key, None)
