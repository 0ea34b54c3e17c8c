"""The trials of a sweep: from its file to checked experiments. Nothing is started here."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsim.comparison import load_comparison_config
from fedsim.config import ExperimentConfig, merged, parse_config, parse_overrides, read_yaml
from fedsim.errors import ConfigError
from fedsim.schema import explain, suggest
from fedsim.sweep import space as spaces
from fedsim.sweep.config import MOST_TRIALS, ROUND_METRICS, EarlyStopping, SweepConfig

RESERVED = ("name", "seed", "tracking")
"""Settings of the experiment that belong to the whole sweep."""


def load_sweep(path: Path, overrides: list[str]) -> "SweepPlan":
    """Read a sweep from a YAML file with `key=value` settings laid upon it, and check it.

    Raises:
        ConfigError: If anything about it is wrong; see `SweepPlan.check`.
    """
    data = merged(read_yaml(path), parse_overrides(overrides))
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, data)}") from None
    base = config.experiment
    if isinstance(base, str):
        base = read_yaml(path.parent / base)
    try:
        return SweepPlan(config, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Trial:
    """One simulation of a sweep.

    Attributes:
        number: Its number, which is its name, its folder and its tag in MLflow.
        point: Number of its point in the space.
        seed: The experiment's seed.
        values: The point: a value for each path of the space.
    """

    number: int
    point: int
    seed: int
    values: spaces.Point

    @property
    def title(self) -> str:
        """The number in four digits."""
        return f"{self.number:04d}"


@dataclass
class SweepPlan:
    """A sweep with its base experiment; making one checks it.

    Attributes:
        config: The sweep.
        base: Settings of the base experiment.
    """

    config: SweepConfig
    base: dict[str, Any]
    space: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Parse the space and check the whole sweep."""
        self.space = {path: spaces.parse(value, path) for path, value in self.config.space.items()}
        for path, node in self.space.items():
            if not isinstance(node, spaces.Options | spaces.Range):
                raise ConfigError(f"space: {path}: expected a distribution (grid, uniform, …), got {node!r}")
            if path.split(".")[0] in RESERVED:
                raise ConfigError(f"space: {path}: this is the sweep's to set, not a trial's")
        self._check_size()
        self.check()

    @cached_property
    def cells(self) -> list[spaces.Point]:
        """The points of a sweep over a comparison: each cell's whole experiment under the path `.`."""
        assert self.config.comparison
        comparison = load_comparison_config(self.config.comparison)
        one_seed = comparison.model_copy(update={"seeds": self.config.seeds[:1]})
        tags = ("table", "dataset", "defense")
        return [
            {".": _without(cell.config.to_dict()), "tags": {name: getattr(cell, name) for name in tags}}
            for cell in one_seed.cells()
        ]

    @property
    def points(self) -> int | None:
        """How many points there are at most; None: as many as the hours allow."""
        trials = self.config.budget.trials
        budget = None if trials is None else max(1, trials // len(self.config.seeds))
        if self.config.search.name != "grid":
            return budget
        whole = len(self.cells) if self.config.comparison else spaces.count(self.space)
        return whole if budget is None else min(whole, budget)

    @property
    def trials(self) -> int | None:
        """How many trials there are at most."""
        return None if self.points is None else self.points * len(self.config.seeds)

    def grid(self) -> Iterator[spaces.Point]:
        """Yield the points of a grid in order."""
        return iter(self.cells) if self.config.comparison else spaces.enumerate_grid(self.space)

    def experiment(self, trial: Trial) -> ExperimentConfig:
        """Return the experiment of a trial.

        Raises:
            ConfigError: If its values do not fit together.
        """
        values = {path: value for path, value in trial.values.items() if path != "tags"}
        data = spaces.lay_point(_without(self.base), values)
        fixed: dict[str, Any] = {"name": f"{self.config.name}-{trial.title}", "seed": trial.seed}
        if "tracking" in self.base:
            fixed["tracking"] = self.base["tracking"]
        config = parse_config({**data, **fixed}, f"the point {describe(trial.values)}")
        if config.runtime.workers == "auto":
            # Trials fill the machine; a trial with many workers is for a question about workers.
            runtime = config.runtime.model_copy(update={"workers": 1})
            config = config.model_copy(update={"runtime": runtime})
        return config

    def samples(self) -> Iterator[ExperimentConfig]:
        """Yield experiments that cover the space: all of a small grid, else every option and end of a range."""
        whole = self.config.search.name == "grid"
        points = self.grid() if whole else spaces.corners(self.space)
        seed = self.config.seeds[0]
        for number, point in enumerate(points):
            yield self.experiment(Trial(number, number, seed, point))

    def _check_size(self) -> None:
        trials = self.trials
        if self.config.search.name == "grid" and not all(map(spaces.is_grid, self.space.values())):
            raise ConfigError("search: grid takes grids and choices only; for ranges name random or optuna")
        if trials is not None and trials > MOST_TRIALS:
            seeds = len(self.config.seeds)
            raise ConfigError(
                f"{trials // seeds:,} points with {seeds} seeds are {trials:,} trials; at most {MOST_TRIALS:,} "
                f"(budget.trials takes the first so many)"
            )

    def check(self) -> None:
        """Check every experiment of a grid, and every option and end of a range of other spaces.

        Raises:
            ConfigError: With the first path or value that is wrong, or a metric that no trial reports.
        """
        config = self.config
        if len(set(config.seeds)) < len(config.seeds):
            raise ConfigError("seeds: each once, please")
        self._check_running_metrics()
        metrics = set(reported(next(self.samples())))
        for sample in self.samples():
            metrics &= set(reported(sample))
            if missing := [name for name in config.objectives if name not in metrics]:
                hint = suggest(missing[0], metrics)
                raise ConfigError(f"objectives: not every trial reports {hint}{self._why(missing[0])}")

    @staticmethod
    def _why(metric: str) -> str:
        return " (no attack tries every trial)" if metric in ("PSNR", "SSIM") else ""

    def _check_running_metrics(self) -> None:
        for name in self.config.stop:
            if name not in ROUND_METRICS:
                raise ConfigError(f"stop: no round reports {suggest(name, ROUND_METRICS)}")
        scheduler = self.config.scheduler
        if isinstance(scheduler, EarlyStopping) and scheduler.metric not in ROUND_METRICS:
            raise ConfigError(f"scheduler.metric: no round reports {suggest(scheduler.metric, ROUND_METRICS)}")


def reported(config: ExperimentConfig) -> list[str]:
    """Return the names of the metrics that a trial has at its end; `trial.final_metrics` makes them."""
    names = [*ROUND_METRICS, "ART"]
    if config.overhead_pairs and config.defense.name != "none":
        names.append("ART_overhead")
    if not (config.attacks and config.audit.rounds):
        return names
    stems = [""]
    for attack in config.attacks:
        stems.append(f"{attack.title}.")
        for adversary in config.audit.adversaries:
            stems += [f"{attack.title}-{adversary}-r{round_}." for round_ in config.audit.rounds]
    return names + [f"{stem}{metric}" for stem in stems for metric in ("PSNR", "SSIM")]


def describe(values: spaces.Point) -> str:
    """Return a point as one short text."""
    if "tags" in values:
        return " ".join(map(str, values["tags"].values()))
    return ", ".join(f"{path}={_short(value)}" for path, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    if not isinstance(value, dict):
        return str(value)
    rest = ", ".join(f"{key}={_short(item)}" for key, item in value.items() if key != "name")
    return f"{value['name']}({rest})" if "name" in value and rest else str(value.get("name", f"({rest})"))


def _without(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in RESERVED}
