"""fedsim: what can an honest-but-curious server reconstruct, and what does each defense cost?"""

import os

# Ray and MLflow read these when they are imported, and workers inherit them.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
