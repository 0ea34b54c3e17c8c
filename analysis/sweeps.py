"""Read one sweep back from MLflow: its trials, and how close each adversary came."""

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.adversaries import ADVERSARIES, strongest_of
from analysis.load import artifact, find_parent, open_store, search_runs
from fedsim.errors import ConfigError

KEPT = ("ACC", "ART", "upload_bytes")
"""Figures of a trial that every run has."""


@dataclass(frozen=True)
class SweepResults:
    """What MLflow holds of a sweep.

    Attributes:
        name: The sweep's name.
        run_id: Its MLflow run.
        config: The sweep as YAML text.
        trials: One row a finished simulation: `trial` (the point), `seed`, `dataset`, `defense`, ACC, ART,
            `upload_bytes`, `test_images`, `floor` (PSNR in dB of the best blind guess), and each setting of the
            experiment by its dotted path.
        images: One row a reconstructed image: `trial`, `seed`, `dataset`, `defense`, `attack`, `adversary`,
            `strategy`, PSNR, SSIM, `stalled`, `exhausted`.
        varied: Paths of the settings that differ between trials, without seed and name.
    """

    name: str
    run_id: str
    config: str
    trials: pd.DataFrame
    images: pd.DataFrame
    varied: list[str]


def load_sweep(tracking_uri: str, name: str | None = None) -> SweepResults:
    """Read the newest sweep of that name (of all, without a name).

    Raises:
        ConfigError: If the store cannot be read or holds no such sweep, or none of its trials has finished.
    """
    client, parents = open_store(tracking_uri, "sweep")
    parent = find_parent(parents, tracking_uri, name, "sweep")
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and attributes.status = 'FINISHED'"
    runs = [r for r in search_runs(client, [parent.info.experiment_id], query) if "ACC" in r.data.metrics]
    rows, images = [], []
    for run in reversed(runs):
        result = artifact(tracking_uri, run.info.artifact_uri, "result.json")
        if result:
            summary = json.loads(result)
            place = _place(run, summary)
            rows.append(place | _figures(summary) | _flat(summary["config"]))
            images += [place | audit for audit in summary["audits"]]
    if not rows:
        raise ConfigError(f"sweep {parent.data.tags.get('fedsim.name')!r} has no finished trial yet")
    trials = pd.DataFrame(rows)
    return SweepResults(
        name=parent.data.tags.get("fedsim.name", parent.info.run_name),
        run_id=parent.info.run_id,
        config=(artifact(tracking_uri, parent.info.artifact_uri, "sweep.yaml") or b"").decode("utf-8"),
        trials=trials,
        images=pd.DataFrame(images),
        varied=_varied(trials),
    )


def _place(run: Any, summary: dict[str, Any]) -> dict[str, Any]:
    tags = run.data.tags
    return {
        "trial": tags["fedsim.trial"],
        "seed": int(tags["fedsim.seed"]),
        "dataset": summary["dataset"],
        "defense": tags["fedsim.defense"],
    }


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    floors = [guess["PSNR"] for guess in (summary.get("floors") or {}).values()]
    similar = [guess["SSIM"] for guess in (summary.get("floors") or {}).values()]
    return {
        **{name: summary.get(name) for name in KEPT},
        "ART_overhead": (summary.get("overhead") or {}).get("median"),
        "floor": max(floors, default=float("nan")),
        "floor_SSIM": max(similar, default=float("nan")),
    }


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted path; lists by index."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            flat[f"{prefix}{name}"] = value
    return flat


def _varied(trials: pd.DataFrame) -> list[str]:
    own = {"trial", "seed", "dataset", "defense", "floor", "floor_SSIM", "ART_overhead", "name", "rounds", *KEPT}
    paths = [path for path in trials.columns if path not in own]
    return [path for path in paths if trials[path].astype(str).nunique() > 1]


def strongest(images: pd.DataFrame, adversary: str) -> pd.DataFrame:
    """Return the images of the best attack that an adversary can make, by trial and seed.

    An adversary can also do what those can who know less; best is the highest mean PSNR in a trial over its seeds.

    Args:
        images: As `SweepResults.images`.
        adversary: One of `adversaries.ADVERSARIES`.
    """
    able = images[images["adversary"].isin(ADVERSARIES[: ADVERSARIES.index(adversary) + 1])]
    if able.empty:
        return able
    return pd.concat([strongest_of(own) for _, own in able.groupby("trial", sort=False)])
