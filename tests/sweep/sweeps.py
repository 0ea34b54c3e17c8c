"""Sweeps that the tests share."""

from typing import Any

from fedsim.config import merged
from fedsim.sweep.config import SweepConfig
from fedsim.sweep.plan import SweepPlan

EXPERIMENT: dict[str, Any] = {
    "federation": {"rounds": 4, "clients": 12, "clients_per_round": 4, "batch_size": 8, "evaluate_every": 2},
    "attacks": [{"name": "dlg", "iterations": 5}],
    "audit": {"victims": 1},
    "checkpoint_every": 1,
}


def sweep(space: dict[str, Any], experiment: dict[str, Any] | None = None, **settings: Any) -> SweepPlan:
    """A sweep of small experiments on the digits."""
    base = merged(EXPERIMENT, experiment or {})
    data = {"name": "small", "experiment": base, "space": space, **settings}
    return SweepPlan(SweepConfig.model_validate(data), base)
