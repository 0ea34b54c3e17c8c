"""What the driver knows of one round: who takes part, whether they are enough, and how it went."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.engine.chunks import ChunkReport
from fedsim.engine.session import SessionSpec
from fedsim.errors import RunError


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
        rejected: Clients whose updates could not be used, and why.
        clients_dropped: Sampled clients that never reported.
        clients_late: Sampled clients that reported too late.
        late_bytes: What these sent in vain, taken to be as much a client as the others.
        simulated_seconds: Simulated time until the server had its updates; None without stragglers.
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
    rejected: dict[int, str]
    clients_dropped: int
    clients_late: int
    late_bytes: float
    simulated_seconds: float | None


class Round:
    """A round that begins with its creation.

    Attributes:
        number: Its number, from 0.
        who: Who of the sampled clients reports back.
    """

    def __init__(self, number: int, spec: SessionSpec) -> None:
        """Draw the cohort."""
        self._start = time.perf_counter()
        self.number, self.who = number, spec.participation(number)
        self._least = spec.config.federation.min_clients

    def check_quorum(self, reports: Sequence[ChunkReport]) -> None:
        """See that enough clients report back and, as far as `reports` are there, sent a usable update.

        Raises:
            RunError: If not, with who is missing and why.
        """
        rejected = {client: reason for report in reports for client, reason in report.rejected.items()}
        usable = len(self.who.clients) - len(rejected)
        if usable < self._least:
            sampled = len(self.who.clients) + len(self.who.dropped) + len(self.who.late)
            raise RunError(
                f"round {self.number}: {usable} of {sampled} clients sent a usable update, fewer than "
                f"federation.min_clients ({self._least}): {len(self.who.dropped)} dropped out, "
                f"{len(self.who.late)} were late, {len(rejected)} sent what is not finite or has the wrong size"
                + "".join(f" (client {client}: {reason})" for client, reason in [*rejected.items()][:1])
            )

    def record(
        self, reports: Sequence[ChunkReport], server_seconds: dict[str, float], workers: int
    ) -> RoundRecord:
        """Return what to note of the round, which ends now.

        Args:
            reports: What its chunks reported.
            server_seconds: The server's times, by what it did.
            workers: How many workers there are.
        """
        seconds = time.perf_counter() - self._start
        local = sum(report.local_seconds for report in reports)
        defense = sum(report.defense_seconds for report in reports)
        client_weights = [weight for report in reports for weight in report.client_weights]
        upload_bytes = sum(report.upload_bytes for report in reports) / len(self.who.clients)
        return RoundRecord(
            round=self.number,
            loss=sum(report.loss for report in reports) / sum(client_weights),
            seconds=seconds,
            local_seconds=local,
            defense_seconds=defense,
            aggregate_seconds=server_seconds["aggregate"],
            compensate_seconds=server_seconds["compensate"],
            idle_seconds=seconds - (local + defense) / workers,
            upload_bytes=upload_bytes,
            clients=len(client_weights),
            rejected={client: reason for report in reports for client, reason in report.rejected.items()},
            clients_dropped=len(self.who.dropped),
            clients_late=len(self.who.late),
            late_bytes=len(self.who.late) * upload_bytes,
            simulated_seconds=self.who.seconds,
        )
