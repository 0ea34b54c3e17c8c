"""What else the machine does while the study measures: times on a busy machine are not those of a quiet one."""

import time
from dataclasses import dataclass

import psutil

BUSY = 0.1
"""Share of the machine's CPU time from which other processes are said to have disturbed a measurement."""


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds up to a moment.

    Attributes:
        at: The moment, in seconds.
        machine: Spent on this machine by all processes, and stolen from it by its host.
        own: Spent by this process and all below it: a private Ray and its workers.
    """

    at: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> "CpuTimes":
        """Read the clocks."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # On Linux the guests' time is part of the users'.
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        driver = psutil.Process()
        own = sum(_spent(process) for process in [driver, *driver.children(recursive=True)])
        return cls(time.perf_counter(), sum(times) - idle - guests, own)

    def others_since(self, before: "CpuTimes") -> float:
        """Return the share of the machine's CPU time since `before` that went to other processes, 0–1."""
        whole = (psutil.cpu_count() or 1) * (self.at - before.at)
        foreign = (self.machine - before.machine) - (self.own - before.own)
        return min(1.0, max(0.0, foreign / whole))


def _spent(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has ended
        return 0.0
    return float(times.user + times.system)
