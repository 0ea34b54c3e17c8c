"""The cells of a comparison (data sets × attacks × defenses × seeds), from a preset or a file."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedsim.config import ExperimentConfig, RuntimeConfig, TrackingConfig, parse_config
from fedsim.errors import ConfigError
from fedsim.schema import NAME, NAME_IN_WORDS, Schema, explain, suggest
from fedsim.settings import merged, read_yaml

Settings = dict[str, Any]


class TableConfig(Schema):
    """One table of the paper: an attack, and what is particular to it."""

    attack: Settings
    """Settings of the attack."""
    experiment: Settings = Field(default_factory=dict)
    """Laid over the common experiment in this table (e.g. the model)."""
    datasets: dict[str, Settings] = Field(default_factory=dict)
    """By data set: laid over that in turn."""
    defenses: dict[str, Settings] = Field(default_factory=dict)
    """By defense: laid over the defense's settings in this table (its strength)."""


class ComparisonConfig(Schema):
    """The cells of a comparison, as layers of settings."""

    name: str = Field(pattern=NAME)
    """Name of the comparison and of its folder."""
    datasets: tuple[str, ...] = Field(min_length=1)
    """Names of the data sets."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """One simulation a cell for each seed."""
    tables: dict[str, TableConfig] = Field(min_length=1)
    """The tables, by name: `dga` and `gia` in the slides."""
    defenses: dict[str, Settings] = Field(min_length=1)
    """Settings of each defense, by the label it has in the tables."""
    muted: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By defense: parameters that a second attack leaves out of the matching (`<defense>_muted`)."""
    experiment: Settings = Field(default_factory=dict)
    """What all cells share."""
    dataset_settings: dict[str, Settings] = Field(default_factory=dict)
    """By data set: laid over the common experiment (e.g. the number of rounds)."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Processes and devices."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    def fingerprint(self) -> str:
        """Return a digest of all that can change a result."""
        data = self.model_dump(mode="json", exclude={"runtime", "tracking"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def cells(self) -> "list[Cell]":
        """Return all cells, checked.

        Raises:
            ConfigError: If any of them is not a valid experiment.
        """
        return [
            Cell(table, dataset, defense, seed, self._experiment(table, dataset, defense, seed))
            for dataset in self.datasets
            for table in self.tables
            for defense in self.defenses
            for seed in self.seeds
        ]

    def _experiment(self, table: str, dataset: str, defense: str, seed: int) -> ExperimentConfig:
        settings = self.tables[table]
        attacks = [settings.attack]
        if defense in self.muted:
            attacks.append({**settings.attack, "label": f"{defense}_muted", "ignore": list(self.muted[defense])})
        data: Settings = {"data": {"name": dataset}}
        for layer in (
            self.experiment,
            self.dataset_settings.get(dataset, {}),
            settings.experiment,
            settings.datasets.get(dataset, {}),
        ):
            data = merged(data, layer)
        data |= {
            "name": f"{table}-{dataset}-{defense}-seed{seed}",
            "seed": seed,
            "defense": merged(self.defenses[defense], settings.defenses.get(defense, {})),
            "attacks": attacks,
            "runtime": self.runtime.model_dump(),
            "tracking": self.tracking.model_dump(),
        }
        return parse_config(data, f"{self.name}, cell {data['name']}")


@dataclass(frozen=True)
class Cell:
    """One simulation of a comparison, and where it stands in the tables."""

    table: str
    dataset: str
    defense: str
    seed: int
    config: ExperimentConfig


def load_comparison_config(source: str) -> ComparisonConfig:
    """Read a comparison: the name of a preset, or a YAML file.

    Raises:
        ConfigError: If there is no such preset or file, or it is not valid.
    """
    data = read_yaml(_locate(source))
    return parse_comparison(data, source)


def parse_comparison(data: Settings, source: str) -> ComparisonConfig:
    """Check plain data and return the comparison; ConfigError says what is wrong with it."""
    try:
        return ComparisonConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, data)}") from None


def presets() -> list[str]:
    """Return the names of the presets that come with fedsim."""
    return sorted(
        Path(file.name).stem for file in resources.files("fedsim.presets").iterdir() if file.name.endswith(".yaml")
    )


def _locate(source: str) -> Path:
    if source.endswith((".yaml", ".yml")):
        return Path(source)
    if source not in presets():
        raise ConfigError(f"no preset {suggest(source, presets())}; a file is named with its .yaml")
    return Path(str(resources.files("fedsim.presets") / f"{source}.yaml"))


def narrow(
    config: ComparisonConfig,
    datasets: Sequence[str] | None = None,
    defenses: Sequence[str] | None = None,
    tables: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    name: str | None = None,
) -> ComparisonConfig:
    """Return the part of a comparison that is asked for, under a name that says what was chosen.

    Raises:
        ConfigError: If a defense or table is not in the comparison, or the name is none for a folder; unknown data
            sets fail in `cells`.
    """
    if name is not None and not re.fullmatch(NAME, name):
        raise ConfigError(f"--name: {NAME_IN_WORDS}, got {name!r}")
    chosen = {
        "defenses": _pick("defense", defenses, config.defenses),
        "tables": _pick("attack", tables, config.tables),
        "datasets": tuple(datasets or config.datasets),
        "seeds": tuple(config.seeds if seeds is None else seeds),
    }
    parts = [config.name, *(datasets or ()), *(tables or ()), *(defenses or ())]
    if seeds is not None:
        parts.append(f"seeds{'-'.join(map(str, seeds))}")
    return config.model_copy(update={**chosen, "name": name or "-".join(parts)})


def _pick(kind: str, wanted: Sequence[str] | None, available: Mapping[str, Any]) -> dict[str, Any]:
    for name in wanted or ():
        if name not in available:
            raise ConfigError(f"--{kind}: no {kind} {suggest(name, available)}")
    return {name: available[name] for name in wanted or available}
