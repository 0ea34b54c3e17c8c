"""What each setting of a sweep does: one at a time, and how much it matters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.statistics import mean_interval
from analysis.sweeps import SweepResults, strongest

FEWEST_TRIALS = 12
"""With fewer trials a fitted model says nothing about importance."""


@dataclass(frozen=True)
class Importance:
    """How much a random forest's fit of one figure suffers when one setting is shuffled.

    Attributes:
        metric: The figure.
        path: The setting.
        mean: Mean loss of R² over shuffles; 0: the setting does not matter, or only beside another one.
        std: Its standard deviation.
        fit: R² of the forest on trials that it was not grown on; below about 0.5 the rest means little.
    """

    metric: str
    path: str
    mean: float
    std: float
    fit: float


def figures_of(sweep: SweepResults, adversary: str) -> pd.DataFrame:
    """Return the trials with the PSNR and SSIM of an adversary's strongest attack beside them."""
    if sweep.images.empty:
        return sweep.trials
    means = strongest(sweep.images, adversary).groupby(["trial", "seed"])[["PSNR", "SSIM"]].mean()
    return sweep.trials.merge(means.reset_index(), on=["trial", "seed"], how="left")


def marginal(figures: pd.DataFrame, path: str, metric: str) -> pd.DataFrame:
    """Return the mean of a figure at each value of a setting, over all else that varies.

    Returns:
        One row a value in ascending order: the setting, `mean`, `margin` of the 95 % interval, `trials`.
    """
    known = figures[figures[path].notna() & figures[metric].notna()]
    rows = []
    for value, own in known.groupby(path):
        estimate = mean_interval(own[metric], range(len(own)))
        margin = estimate.margin if estimate.has_interval else float("nan")
        rows.append({path: value, "mean": estimate.value, "margin": margin, "trials": len(own)})
    return pd.DataFrame(rows, columns=[path, "mean", "margin", "trials"])


def importances(figures: pd.DataFrame, paths: Sequence[str], metrics: Sequence[str]) -> list[Importance]:
    """Return the permutation importance of settings that vary; none from fewer than `FEWEST_TRIALS` trials.

    Source: Breiman, "Random Forests", Machine Learning 45, 2001.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    varied = [path for path in paths if figures[path].astype(str).nunique() > 1]
    found = []
    for metric in metrics:
        known = figures[figures[metric].notna()] if metric in figures else figures.iloc[:0]
        if len(known) < FEWEST_TRIALS or not varied or known[metric].nunique() < 2:
            continue
        inputs = np.column_stack([_numbers(known[path]) for path in varied])
        forest = RandomForestRegressor(200, oob_score=True, random_state=0).fit(inputs, known[metric])
        shuffled = permutation_importance(forest, inputs, known[metric], n_repeats=20, random_state=0)
        found += [
            Importance(metric, path, float(mean), float(std), float(forest.oob_score_))
            for path, mean, std in zip(varied, shuffled.importances_mean, shuffled.importances_std, strict=True)
        ]
    return found


def _numbers(values: pd.Series) -> np.ndarray:
    """Return a setting as numbers: its own, or the rank of its name; −1 where a trial has no such setting."""
    numeric = pd.to_numeric(values, errors="coerce")
    if numeric.notna().any():
        return np.asarray(numeric.fillna(-1), dtype=float)
    return np.asarray(values.astype("category").cat.codes, dtype=float)
