"""What an honest-but-curious server saw of its victims: the whole input of an attack."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.defenses.base import DefenseSettings
from fedsim.learning.models import Model

if TYPE_CHECKING:
    from fedsim.attacks.transformations import Transformation

Adversary = Literal["naive", "adaptive", "oracle"]
"""What the attacker knows of the defense: not that there is one; the scheme and its public parameters; also what
was drawn in secret this round, an upper bound for any attacker who infers it."""

Parameters = Literal["public", "estimated"]
"""Whether who knows the scheme also knows its parameters (number of noisy slices, strength of the noise)."""


@dataclass(frozen=True)
class Victim:
    """A client that the audit watches.

    Attributes:
        client: Its number.
        images: Indices of the images behind what it sends, shape [B].
        stream: Counter of the private randomness with which it protects what it sends.
        steps: Local steps behind what it sends; the images are shared by them evenly, in order.
    """

    client: int
    images: NDArray[np.int64]
    stream: int
    steps: int = 1


@dataclass(frozen=True)
class Payload:
    """What N victims sent, as the server sees it, and what the audit knows of the defense at that moment.

    Attributes:
        gradients: Shape [N, d].
        statistics: Batch-norm statistics, shape [N, b].
        repeats: The same gradients protected R − 1 times more, with fresh draws, shape [N, R − 1, d].
        public: What the defense published for the round.
        secrets: What it drew in secret, each with a leading dimension N: for the oracle alone.
        trust: How much each entry counts in matching, shape [N, d]; None: all alike.
    """

    gradients: NDArray[np.float32]
    statistics: NDArray[np.float32]
    repeats: NDArray[np.float32] | None = None
    public: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    secrets: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    trust: NDArray[np.float32] | None = None

    @classmethod
    def join(cls, parts: "list[Payload]") -> "Payload":
        """Put the payloads of several shards of victims one after the other."""
        first = parts[0]
        return cls(
            np.concatenate([part.gradients for part in parts]),
            np.concatenate([part.statistics for part in parts]),
            None if first.repeats is None else np.concatenate([r for p in parts if (r := p.repeats) is not None]),
            first.public,
            {name: np.concatenate([part.secrets[name] for part in parts]) for name in first.secrets},
            None if first.trust is None else np.concatenate([t for p in parts if (t := p.trust) is not None]),
        )

    def moved(self, learning_rate: float) -> "Payload":
        """Return what was sent as how far it moves the weights: gradients times the local learning rate."""
        return replace(self, gradients=np.float32(learning_rate) * self.gradients)

    def select(self, victims: slice) -> "Payload":
        """Return the payload of some of the victims."""
        return Payload(
            self.gradients[victims],
            self.statistics[victims],
            None if self.repeats is None else self.repeats[victims],
            self.public,
            {name: array[victims] for name, array in self.secrets.items()},
            None if self.trust is None else self.trust[victims],
        )


@dataclass(frozen=True)
class Knowledge:
    """What an adversary who is not naive knows of the defense.

    Attributes:
        defense: The scheme and its parameters.
        public: What it published for the round.
        secrets: What it drew in secret, each with a leading dimension N; empty for all but the oracle.
        repeats: What the victims sent in other rounds at the same weights, shape [N, R − 1, d].
        parameters: Whether the scheme's own parameters are known or have to be estimated.
    """

    defense: DefenseSettings
    public: Mapping[str, Tensor]
    secrets: Mapping[str, Tensor]
    repeats: Tensor
    parameters: Parameters = "public"


@dataclass(frozen=True)
class LocalTraining:
    """The local SGD behind what was sent, which is public; one step is a plain gradient.

    Attributes:
        steps: Local steps; the B images are shared by them evenly, in order.
        learning_rate: The clients' learning rate; None: the attacker does not know it.
    """

    steps: int = 1
    learning_rate: float | None = 1.0


ONE_STEP = LocalTraining()


@dataclass(frozen=True)
class Observation:
    """What the protocol showed the server of N victims in one round. It holds no ground truth.

    Attributes:
        model: The architecture, which is public.
        weights: Global weights that the victims started from, shape [d].
        gradients: What each victim sent, in gradient units, shape [N, d]; times the learning rate, weights before
            minus weights after, where the attacker does not know that.
        batch_size: Number of images B behind each gradient.
        statistics: Batch-norm statistics that each victim sent, shape [N, b]; b = 0 without batch norm.
        labels: The victims' labels, shape [N, B], only when the adversary is assumed to know them.
        seeds: One seed a victim, for the attack's own random draws, length N: a victim is attacked alike
            whichever others are attacked beside it.
        trust: How much each entry of the gradients counts in matching, shape [N, d]: the attacker's own
            judgement of what the defense left intact. None: all alike.
        knowledge: What the adversary knows of the defense; None for the naive one.
        local: The local training behind each gradient.
        transformation: What is done to the dummies' gradients before they are compared; None: nothing.
    """

    model: Model
    weights: Tensor
    gradients: Tensor
    batch_size: int
    statistics: Tensor
    labels: Tensor | None
    seeds: tuple[int, ...]
    trust: Tensor | None = None
    knowledge: Knowledge | None = None
    local: LocalTraining = ONE_STEP
    transformation: "Transformation | None" = None

    @property
    def victims(self) -> int:
        """Number of victims N."""
        return self.gradients.shape[0]

    def select(self, victims: slice) -> "Observation":
        """Return the observation of some of the victims."""
        return replace(
            self,
            gradients=self.gradients[victims],
            statistics=self.statistics[victims],
            labels=None if self.labels is None else self.labels[victims],
            seeds=self.seeds[victims],
            trust=None if self.trust is None else self.trust[victims],
            knowledge=self.knowledge and self._knowledge_of(victims),
        )

    def _knowledge_of(self, victims: slice) -> Knowledge:
        assert self.knowledge
        secrets = {name: tensor[victims] for name, tensor in self.knowledge.secrets.items()}
        return replace(self.knowledge, secrets=secrets, repeats=self.knowledge.repeats[victims])


@dataclass(frozen=True)
class Reconstruction:
    """What an attack found for N victims.

    Attributes:
        images: Reconstructed images, shape [N, B, C, H, W]; the audit clamps them to [0, 1].
        labels: Recovered labels, shape [N, B].
        loss: Matching loss of the restart that was chosen (never chosen by PSNR), shape [N].
        iterations: Optimiser steps of that restart, shape [N].
        stalled: The optimiser stopped moving far from any solution, shape [N], bool.
        exhausted: The budget ran out while the loss was still falling, shape [N], bool.
        seconds: Time the whole batch took.
        learning_rates: The local learning rates that were estimated, shape [N]; None: there was nothing to.
    """

    images: Tensor
    labels: Tensor
    loss: Tensor
    iterations: Tensor
    stalled: Tensor
    exhausted: Tensor
    seconds: float
    learning_rates: Tensor | None = None

    def cpu(self) -> "Reconstruction":
        """Return the same on the CPU."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.cpu() for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @classmethod
    def join(cls, parts: list["Reconstruction"]) -> "Reconstruction":
        """Put the results of several shards of victims one after the other."""

        def cat(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        return cls(
            images=cat("images"),
            labels=cat("labels"),
            loss=cat("loss"),
            iterations=cat("iterations"),
            stalled=cat("stalled"),
            exhausted=cat("exhausted"),
            seconds=sum(part.seconds for part in parts),
            learning_rates=None if parts[0].learning_rates is None else cat("learning_rates"),
        )
