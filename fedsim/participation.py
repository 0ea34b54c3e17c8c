"""Who reports back in a round: over-sampling, clients that drop out, and stragglers, in simulated time.

The server samples more clients than it needs, takes the first that report before a deadline and discards the
rest. All of it is a function of (seed, round), so that nobody whose update will be discarded need be computed.

Source: Bonawitz et al., "Towards Federated Learning at Scale: System Design", MLSys 2019 (dropout of 6 to 10 %,
a selection of 130 % of the wanted clients).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedsim.randomness import Purpose, numpy_stream
from fedsim.schema import Schema

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delays = NDArray[np.float64]


class _Stragglers(Schema):
    deadline: Seconds | None = None
    """Simulated seconds after which the server waits no longer; null: until enough have reported."""


class LognormalConfig(_Stragglers):
    """Log-normal delays: most clients are about as fast, a few take many times as long."""

    name: Literal["lognormal"] = "lognormal"
    median: Seconds = 60.0
    """Half of the clients report within so many simulated seconds."""
    sigma: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """Standard deviation of the delay's logarithm."""

    def draw(self, rng: np.random.Generator, clients: int) -> Delays:
        """Return the delay of each client in simulated seconds, shape [clients]."""
        return self.median * np.exp(self.sigma * rng.standard_normal(clients))


class ExponentialConfig(_Stragglers):
    """Shifted exponential delays (Lee et al., "Speeding Up Distributed Machine Learning Using Codes", 2018)."""

    name: Literal["exponential"] = "exponential"
    shift: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The least that any client takes, in simulated seconds."""
    mean: Seconds = 60.0
    """What is added on average, in simulated seconds."""

    def draw(self, rng: np.random.Generator, clients: int) -> Delays:
        """Return the delay of each client in simulated seconds, shape [clients]."""
        return self.shift + self.mean * rng.standard_exponential(clients)


StragglersConfig = Annotated[LognormalConfig | ExponentialConfig, Field(discriminator="name")]


@dataclass(frozen=True)
class Participation:
    """What becomes of the clients that were sampled for one round.

    Attributes:
        clients: Those whose updates are used, in client order.
        dropped: Those that never report, in client order.
        late: Those that report after the deadline, or when enough have reported, in client order.
        seconds: Simulated seconds until the server has its updates or gives up; None without stragglers.
    """

    clients: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    seconds: float | None = None


def sample_size(wanted: int, over_sampling: float) -> int:
    """Return how many clients are sampled where `wanted` are needed: rounded up, but for floating-point dust."""
    return math.ceil(round(wanted * over_sampling, 6))


def participation(
    seed: int,
    round_: int,
    population: int,
    wanted: int,
    over_sampling: float = 1.0,
    dropout: float = 0.0,
    stragglers: LognormalConfig | ExponentialConfig | None = None,
) -> Participation:
    """Draw who takes part in a round.

    Args:
        seed: The experiment's seed.
        round_: The round.
        population: All clients.
        wanted: Updates that the server needs.
        over_sampling: Clients sampled for each that is needed, at least 1.
        dropout: Probability that a sampled client never reports.
        stragglers: How long clients take; None: all report at once, in the order in which they were sampled.
    """
    rng = numpy_stream(seed, Purpose.COHORT, round_)
    sampled = rng.choice(population, sample_size(wanted, over_sampling), replace=False)
    alive, delays = np.ones(len(sampled), dtype=bool), np.zeros(len(sampled))
    # Drawn for all clients, so that a client's fate does not depend on who else was sampled.
    if dropout:
        alive = numpy_stream(seed, Purpose.DROPOUT, round_).random(population)[sampled] >= dropout
    if stragglers:
        delays = stragglers.draw(numpy_stream(seed, Purpose.DELAYS, round_), population)[sampled]
    reporting, delays = sampled[alive], delays[alive]
    deadline = math.inf if stragglers is None or stragglers.deadline is None else stragglers.deadline
    order = np.argsort(delays, kind="stable")
    used, late = np.split(order, [min(wanted, int((delays <= deadline).sum()))])
    return Participation(
        clients=_sorted(reporting[used]),
        dropped=_sorted(sampled[~alive]),
        late=_sorted(reporting[late]),
        seconds=_duration(delays[used], wanted, deadline) if stragglers else None,
    )


def _duration(delays: Delays, wanted: int, deadline: float) -> float:
    """Return when the server has its updates, or knows that it will get no more."""
    if len(delays) < wanted and math.isfinite(deadline):
        return deadline
    return float(delays.max(initial=0.0))


def _sorted(clients: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(np.sort(clients).tolist())
