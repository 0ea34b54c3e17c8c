"""A sweep in one schema: what varies around which experiment, what is sought, and how long it may take."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from fedsim.comparison_config import load_comparison_config
from fedsim.config import ExperimentConfig, TrackingConfig, parse_config
from fedsim.errors import ConfigError
from fedsim.schema import NAME, Schema, explain, suggest
from fedsim.settings import merged, read_yaml
from fedsim.sweep.metrics import ROUND_METRICS, reported_metrics
from fedsim.sweep.space import Interval, Point, Settings, Space, lay


class Objective(Schema):
    """One figure that is sought."""

    metric: str
    """ACC, ART, PSNR, SSIM, … ; PSNR and SSIM are those of the strongest attack of the trial, naive.PSNR of the
    strongest that knows nothing of the defense."""
    direction: Literal["max", "min"]
    """Whether more or less of it is better."""


class FifoConfig(Schema):
    """Every trial runs to its end."""

    name: Literal["fifo"] = "fifo"


class AshaConfig(Schema):
    """Asynchronous successive halving: at each rung only the best share goes on (Li et al., MLSys 2020)."""

    name: Literal["asha"] = "asha"
    grace_rounds: int = Field(default=10, ge=1)
    """Rounds before which no trial is stopped."""
    reduction_factor: float = Field(default=3, gt=1)
    """One in so many goes on at each rung."""


class MedianConfig(Schema):
    """Stops a trial whose best so far is below the median of the others' averages (Golovin et al., KDD 2017)."""

    name: Literal["median"] = "median"
    grace_rounds: int = Field(default=10, ge=1)
    """Rounds before which no trial is stopped."""


class PbtConfig(Schema):
    """Population based training: the worst trials go on from the best ones' weights, with other settings.

    Every axis that is drawn may change. A changed trial is a run of its own in MLflow; its first rounds are those
    of the trial that it was copied from. Which trials meet depends on timing: results are not repeatable to the
    bit, and an interrupted population starts again, each member from its last checkpoint.

    Source: Jaderberg et al., "Population Based Training of Neural Networks", 2017.
    """

    name: Literal["pbt"] = "pbt"
    interval: int = Field(default=20, ge=1)
    """Rounds between comparisons, a multiple of `federation.evaluate_every`; checkpoints are written as often."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the population that is replaced at a comparison, and that is copied."""


SchedulerConfig = Annotated[FifoConfig | AshaConfig | MedianConfig | PbtConfig, Field(discriminator="name")]


class RandomSearchConfig(Schema):
    """The grid, crossed with random draws of the other axes."""

    name: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""


class OptunaSearchConfig(Schema):
    """Optuna's tree-structured Parzen estimator; for several objectives its multi-objective form."""

    name: Literal["optuna"] = "optuna"
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler."""
    startup_trials: int = Field(default=10, ge=1)
    """Random trials before the model takes over."""


SearchConfig = Annotated[RandomSearchConfig | OptunaSearchConfig, Field(discriminator="name")]


class BudgetConfig(Schema):
    """How much may be tried."""

    trials: int | None = Field(default=None, ge=1)
    """Points tried, each with every seed; null: the grid, once."""
    hours: float | None = Field(default=None, gt=0)
    """Hours after which the sweep ends; trials under way are kept for `--resume`."""


class SweepConfig(Schema):
    """Simulations over a search space."""

    name: str = Field(pattern=NAME)
    """Name of the sweep and of its folder."""
    base: str | None = None
    """YAML file of the base experiment, relative to the sweep's own file."""
    experiment: Settings = Field(default_factory=dict)
    """Settings laid over the base experiment (or over the defaults)."""
    space: dict[str, Any] = Field(default_factory=dict)
    """By dotted path: a constant, or {grid: [...]}, {choice: [...]}, {uniform: [low, high]},
    {loguniform: [low, high]}, {quniform: [low, high, step]}."""
    alternatives: tuple[dict[str, Any], ...] = ()
    """Conditional parts of the space: exactly one of them holds in a point, each written as `space` is."""
    comparison: str | None = None
    """In place of experiment and space: every cell of a comparison (a preset or a YAML file), with this sweep's
    seeds."""
    objectives: tuple[Objective, ...] = (Objective(metric="ACC", direction="max"),)
    """What is sought; the first one steers the scheduler."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of every point."""
    scheduler: SchedulerConfig = FifoConfig()
    """Which trials are stopped early."""
    search: SearchConfig = RandomSearchConfig()
    """How points are chosen."""
    budget: BudgetConfig = BudgetConfig()
    """How much is tried."""
    stop: dict[str, float] = Field(default_factory=dict)
    """Ends a trial as soon as a figure that it reports each round reaches this value, e.g. {ACC: 0.95}."""
    retries: int = Field(default=2, ge=0)
    """Times that a trial whose process or node died goes on from its checkpoint."""
    concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; null: as many as the cluster holds."""
    elastic: bool = False
    """The cluster grows on demand: do not refuse a trial that does not fit on it now."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    @model_validator(mode="after")
    def _consistent(self) -> "SweepConfig":
        steered = isinstance(self.scheduler, AshaConfig | MedianConfig | PbtConfig)
        if steered and self.objectives[0].metric not in ROUND_METRICS:
            raise ValueError(
                f"scheduler: {self.scheduler.name} stops trials by the first objective, which must be known every "
                f"round ({', '.join(ROUND_METRICS)}), not {self.objectives[0].metric}"
            )
        if isinstance(self.scheduler, PbtConfig):
            if self.alternatives or isinstance(self.search, OptunaSearchConfig) or len(self.seeds) > 1:
                raise ValueError("scheduler: pbt takes one space without alternatives, one seed and random search")
            axes = list(self.parsed_space().alternatives[0].random.values())
            if not axes or not all(isinstance(axis, Interval) and axis.step is None for axis in axes):
                raise ValueError("scheduler: pbt needs axes that it may change a little: uniform or loguniform")
            if self.concurrent:
                raise ValueError("concurrent: a population trains as many members at a time as the cluster holds")
        if isinstance(self.search, OptunaSearchConfig) and self.budget.trials is None:
            raise ValueError("budget.trials: optuna needs to know how many points to try")
        for metric in self.stop:
            if metric not in ROUND_METRICS:
                raise ValueError(f"stop: not reported every round: {suggest(metric, ROUND_METRICS)}")
        return self

    def fingerprint(self) -> str:
        """Return a digest of what is swept; budget and resources may change on a resume."""
        kept = self.model_dump(
            mode="json", include={"base", "experiment", "space", "alternatives", "seeds", "search"}
        )
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def parsed_space(self) -> Space:
        """Return the space; ConfigError if it is malformed or too large."""
        return Space.parse(self.space, self.alternatives)

    def points(self) -> list[Point]:
        """Return the points of a grid or random search.

        Raises:
            ConfigError: If the budget and the space do not go together.
        """
        space, trials = self.parsed_space(), self.budget.trials
        if trials is None and space.has_random:
            raise ConfigError("budget.trials: a space with random axes needs it")
        if trials is not None and trials < space.combinations:
            raise ConfigError(f"budget.trials: the grid alone has {space.combinations} points, more than {trials}")
        points = space.points(-(-(trials or 1) // space.combinations), self.search.seed)
        return points[:trials]

    def experiment_at(self, point: Point, seed: int) -> ExperimentConfig:
        """Return the experiment at a point; ConfigError with the setting that is wrong."""
        settings = lay(merged(ExperimentConfig().to_dict(), self.experiment), point)
        settings |= {"seed": seed, "name": trial_name(point, seed), "tracking": self.tracking.model_dump()}
        if isinstance(self.scheduler, PbtConfig):
            settings["checkpoint_every"] = self.scheduler.interval
        if settings["runtime"]["workers"] == "auto":
            settings["runtime"]["workers"] = 1
        shown = ", ".join(f"{path}={value}" for path, value in point.items()) or "the base experiment"
        return parse_config(settings, f"{self.name}, {shown}")


def point_id(point: Point) -> str:
    """Return a short name of a point that does not depend on the order of its paths."""
    return hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:10]


def trial_name(point: Point, seed: int) -> str:
    """Return the name of one simulation of a sweep, the same after a resume."""
    return f"{point_id(point)}-seed{seed}"


def load_sweep_config(path: Path) -> SweepConfig:
    """Read a sweep from a YAML file, its base experiment included.

    Raises:
        ConfigError: If a file is missing or not valid.
    """
    data = read_yaml(path)
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, data)}") from None
    if config.comparison is not None:
        return _from_comparison(config, path)
    if config.base is None:
        return config
    base = read_yaml(path.parent / config.base)
    return config.model_copy(update={"base": None, "experiment": merged(base, config.experiment)})


def _from_comparison(config: SweepConfig, path: Path) -> SweepConfig:
    """Return the sweep with what the comparison's cells share as its experiment, and the rest as alternatives."""
    if config.experiment or config.space or config.alternatives or config.base:
        raise ConfigError(f"{path}: comparison: it brings its own experiment and space")
    source = load_comparison_config(str(config.comparison))
    cells = source.model_copy(update={"seeds": config.seeds[:1]}).cells()
    every = [cell.config.model_dump(mode="json", exclude={"name", "seed", "tracking"}) for cell in cells]
    shared = {key: value for key, value in every[0].items() if all(one[key] == value for one in every)}
    rest = [{key: value for key, value in one.items() if key not in shared} for one in every]
    return config.model_copy(update={"comparison": None, "experiment": shared, "alternatives": tuple(rest)})


def check_sweep(config: SweepConfig) -> None:
    """See that every point that could be tried is a valid experiment that reports the objectives.

    A grid or random search is checked point by point; for Optuna every choice and both ends of every interval.

    Raises:
        ConfigError: With the first that is not.
    """
    space = config.parsed_space()
    adaptive = isinstance(config.search, OptunaSearchConfig)
    tried = [] if adaptive else config.points()
    for point in [*space.corners(grid=adaptive), *tried]:
        experiment = config.experiment_at(point, config.seeds[0])
        every = experiment.federation.evaluate_every
        if isinstance(config.scheduler, PbtConfig) and config.scheduler.interval % every:
            raise ConfigError(
                f"scheduler.interval: it must be a multiple of federation.evaluate_every ({every}), "
                f"got {config.scheduler.interval}"
            )
        known = reported_metrics(experiment)
        for objective in config.objectives:
            if objective.metric not in known:
                raise ConfigError(f"objectives: no trial reports {suggest(objective.metric, known)}")
