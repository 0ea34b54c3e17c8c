"""The settings of all cells, told once each: by what they depend on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.frames import CellKey
from analysis.load import parsed
from analysis.names import dataset_title, look, table_name

FACTORS = (
    (),
    ("table",),
    ("dataset",),
    ("defense",),
    ("table", "dataset"),
    ("table", "defense"),
    ("dataset", "defense"),
    ("table", "dataset", "defense"),
    ("table", "dataset", "defense", "seed"),
)
"""What a setting may depend on; the first that explains its values is taken."""

LEFT_OUT = ("name", "seed", "tracking", "checkpoint_every")
"""Settings that cannot change a result, or that the cell's own name tells."""


@dataclass(frozen=True)
class SettingsGroup:
    """Settings that depend on the same things.

    Attributes:
        title: What they depend on.
        rows: For each combination of those things, its name and its settings by dotted path.
    """

    title: str
    rows: list[tuple[str, dict[str, str]]]


def settings_groups(configs: Mapping[CellKey, str]) -> list[SettingsGroup]:
    """Return the settings of all cells, those common to all first."""
    flat = {key: _flat(parsed(text)) for key, text in configs.items() if text}
    paths = dict.fromkeys(path for settings in flat.values() for path in settings)
    by_factor: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        by_factor.setdefault(_factor(path, flat), []).append(path)
    return [_group(factor, by_factor[factor], flat) for factor in FACTORS if factor in by_factor]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    settings: dict[str, str] = {}
    for name, value in config.items():
        if not prefix and name in LEFT_OUT:
            continue
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            settings |= _flat(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = "null" if value is None else str(value)
    return settings


def _factor(path: str, flat: Mapping[CellKey, Mapping[str, str]]) -> tuple[str, ...]:
    return next(factor for factor in FACTORS if _explains(factor, path, flat))


def _explains(factor: tuple[str, ...], path: str, flat: Mapping[CellKey, Mapping[str, str]]) -> bool:
    seen: dict[tuple[object, ...], str | None] = {}
    return all(seen.setdefault(_pick(key, factor), own.get(path)) == own.get(path) for key, own in flat.items())


def _pick(key: CellKey, factor: tuple[str, ...]) -> tuple[object, ...]:
    return tuple(getattr(key, name) for name in factor)


def _group(factor: tuple[str, ...], paths: list[str], flat: Mapping[CellKey, Mapping[str, str]]) -> SettingsGroup:
    rows: dict[str, dict[str, str]] = {}
    for key, settings in flat.items():
        own = {path: settings[path] for path in paths if path in settings}
        if own:
            rows[_named(key, factor)] = own
    title = f"by {' and '.join(name.replace('dataset', 'data set') for name in factor)}" if factor else "all cells"
    return SettingsGroup(title, list(rows.items()))


def _named(key: CellKey, factor: tuple[str, ...]) -> str:
    names = {
        "table": table_name(key.table),
        "dataset": dataset_title(key.dataset),
        "defense": look(key.defense).short,
        "seed": f"seed {key.seed}",
    }
    return " · ".join(names[name] for name in factor) or "all"
