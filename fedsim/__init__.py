"""fedsim: what can an honest-but-curious server reconstruct, and what does each defense cost?"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Ray and MLflow read these when they are imported, and workers inherit them.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray starts workers at niceness 15: whatever else the machine does would count in the round time.
os.environ.setdefault("RAY_worker_niceness", "0")
# A failed call is handled once; Ray would print its error for each of its other return values.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

if TYPE_CHECKING:
    from fedsim.attacks.base import Attack as Attack
    from fedsim.comparison import Comparison as Comparison
    from fedsim.comparison_config import ComparisonConfig as ComparisonConfig
    from fedsim.config import ExperimentConfig as ExperimentConfig
    from fedsim.defenses.base import ClientContext as ClientContext
    from fedsim.defenses.base import Defense as Defense
    from fedsim.defenses.base import ServerContext as ServerContext
    from fedsim.engine.runtime import Runtime as Runtime
    from fedsim.privacy.observation import Observation as Observation
    from fedsim.privacy.observation import Reconstruction as Reconstruction
    from fedsim.results import SimulationResult as SimulationResult
    from fedsim.simulation import Simulation as Simulation

_HOMES = {
    "Attack": "fedsim.attacks.base",
    "ClientContext": "fedsim.defenses.base",
    "Comparison": "fedsim.comparison",
    "ComparisonConfig": "fedsim.comparison_config",
    "Defense": "fedsim.defenses.base",
    "ExperimentConfig": "fedsim.config",
    "Observation": "fedsim.privacy.observation",
    "Reconstruction": "fedsim.privacy.observation",
    "Runtime": "fedsim.engine.runtime",
    "ServerContext": "fedsim.defenses.base",
    "Simulation": "fedsim.simulation",
    "SimulationResult": "fedsim.results",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # PyTorch and Ray take seconds to import; `fedsim --help` should not wait for them.
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
