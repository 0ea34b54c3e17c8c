"""What a sweep file may say: base experiment, search space, objectives, and how to search."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedsim.schema import Schema

MOST_TRIALS = 10_000
ROUND_METRICS = ("ACC", "loss", "test_loss", "seconds", "upload_bytes")
"""What a trial reports while it runs; `ACC` and `test_loss` in rounds that are evaluated."""


class GridConfig(Schema):
    """Every combination of a space of `grid`s and `choice`s."""

    name: Literal["grid"] = "grid"


class RandomConfig(Schema):
    """Independent draws; an option of a grid or a choice is drawn with equal chance."""

    name: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""


class OptunaConfig(Schema):
    """Optuna's tree-structured Parzen estimator; with several objectives its multi-objective form."""

    name: Literal["optuna"] = "optuna"
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler."""
    startup: int = Field(default=10, ge=1)
    """Points drawn at random before the estimator is used."""


class FifoConfig(Schema):
    """Every trial runs to its end."""

    name: Literal["fifo"] = "fifo"


class EarlyStopping(Schema):
    """What schedulers that stop trials early have in common."""

    metric: str = "ACC"
    """Metric that trials report while they run, by which they are compared."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better."""
    grace_rounds: int = Field(default=10, ge=1)
    """Rounds before which no trial is stopped."""


class AshaConfig(EarlyStopping):
    """Asynchronous successive halving (Li et al., MLSys 2020)."""

    name: Literal["asha"] = "asha"
    reduction: float = Field(default=3, gt=1)
    """Of this many trials at a rung, one goes on."""


class MedianConfig(EarlyStopping):
    """Stops a trial whose best is worse than the median of the others' running means."""

    name: Literal["median"] = "median"
    min_trials: int = Field(default=3, ge=1)
    """Trials that must have come as far before one is stopped."""


SearchConfig = Annotated[GridConfig | RandomConfig | OptunaConfig, Field(discriminator="name")]
SchedulerConfig = Annotated[FifoConfig | AshaConfig | MedianConfig, Field(discriminator="name")]


class BudgetConfig(Schema):
    """How much a sweep may spend."""

    trials: int | None = Field(default=None, ge=1, le=MOST_TRIALS)
    """Trials, over all seeds; null: all of the grid (other searches need a number here or hours)."""
    hours: float | None = Field(default=None, gt=0)
    """After so many hours no trial is started; those under way go on to their end."""


class StopConfig(Schema):
    """Bounds of a metric at which a trial is stopped."""

    at_least: float | None = None
    """Stop when the metric is this or more."""
    at_most: float | None = None
    """Stop when the metric is this or less."""

    def met(self, value: float | None) -> bool:
        """Return whether a trial with this value is to stop."""
        if value is None:
            return False
        over = self.at_least is not None and value >= self.at_least
        return over or (self.at_most is not None and value <= self.at_most)


class SweepConfig(Schema):
    """A sweep as it is written in `tune_configs/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep and of its folder."""
    experiment: dict[str, Any] | str = Field(default_factory=dict)
    """What all trials share: settings, or a YAML file of them (its path is relative to the sweep's)."""
    space: dict[str, Any] = Field(default_factory=dict)
    """A distribution for each path; the path `.` is the whole experiment."""
    comparison: str | None = None
    """In place of experiment and space: every cell of this comparison (a preset or a YAML file)."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """One trial a point for each of them."""
    objectives: dict[str, Literal["max", "min"]] = Field(default={"ACC": "max"}, min_length=1)
    """Metrics to optimise with their directions; with several the summary is the Pareto set.

    `PSNR` and `SSIM` are those of the most successful attack; `<attack>.PSNR` those of one attack, and
    `<attack>-<adversary>-r<round>.PSNR` those of one audit.
    """
    search: SearchConfig = GridConfig()
    """How points are chosen."""
    scheduler: SchedulerConfig = FifoConfig()
    """Which trials are stopped early."""
    budget: BudgetConfig = BudgetConfig()
    """When the sweep ends."""
    stop: dict[str, StopConfig] = Field(default_factory=dict)
    """By metric that trials report while they run: when a trial has seen enough."""
    concurrent: int | None = Field(default=None, ge=1)
    """Most trials at a time; null: as many as there is room for."""
    retries: int = Field(default=3, ge=0)
    """Times that a trial whose process died is started again from its checkpoint."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "SweepConfig":
        if self.comparison is not None and (self.space or self.experiment):
            raise ValueError("comparison: it brings its own settings; leave out experiment and space")
        if self.comparison is None and not self.space:
            raise ValueError("space: it is empty; name a path and a distribution, e.g. defense.sigma")
        if self.search.name == "grid":
            return self
        if self.comparison is not None:
            raise ValueError(f"search: a comparison is a grid, not for {self.search.name}")
        if self.budget.trials is None and self.budget.hours is None:
            raise ValueError(f"budget: {self.search.name} needs trials or hours")
        return self

    def fingerprint(self) -> str:
        """Return a digest of all that says which trials there are; budget, stopping and room may change."""
        data = self.model_dump(mode="json", exclude={"budget", "concurrent", "retries"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
