"""What a config can name, with every setting, its default and its meaning: read from the schema itself."""

from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsim.attacks import AttackConfig
from fedsim.comparison_config import presets
from fedsim.config import AuditConfig, ExperimentConfig, FederationConfig, RuntimeConfig, TrackingConfig
from fedsim.data.datasets import DatasetConfig
from fedsim.data.partitions import PartitionConfig
from fedsim.defenses import DefenseConfig
from fedsim.errors import ConfigError
from fedsim.learning.models import ModelConfig
from fedsim.learning.server_optimizers import ServerOptimizerConfig
from fedsim.participation import StragglersConfig
from fedsim.payload_config import PayloadAttackConfig
from fedsim.schema import Schema, suggest

UNIONS: dict[str, Any] = {
    "data": DatasetConfig,
    "partitions": PartitionConfig,
    "models": ModelConfig,
    "servers": ServerOptimizerConfig,
    "stragglers": StragglersConfig,
    "defenses": DefenseConfig,
    "attacks": AttackConfig,
}
SECTIONS: dict[str, type[Schema]] = {
    "experiment": ExperimentConfig,
    "federation": FederationConfig,
    "audit": AuditConfig,
    "runtime": RuntimeConfig,
    "tracking": TrackingConfig,
    "payload": PayloadAttackConfig,
}


def members(union: Any) -> dict[str, type[Schema]]:
    """Return the settings classes of a discriminated union by their names."""
    return {member.model_fields["name"].default: member for member in get_args(get_args(union)[0])}


def print_catalogue(kind: str | None, console: Console) -> None:
    """Print all kinds with their names, or one kind with every setting.

    Raises:
        ConfigError: If there is no such kind.
    """
    if kind is None:
        _print_names(console)
    elif kind in UNIONS:
        for name, settings in members(UNIONS[kind]).items():
            _print_settings(name, settings, console)
    elif kind in SECTIONS:
        _print_settings(kind, SECTIONS[kind], console)
    else:
        raise ConfigError(f"nothing to list called {suggest(kind, [*UNIONS, *SECTIONS])}")


def _print_names(console: Console) -> None:
    table = Table(box=None, show_header=False)
    for kind, union in UNIONS.items():
        table.add_row(kind, ", ".join(members(union)))
    table.add_row("presets", ", ".join(presets()))
    console.print(table)
    console.print(
        f"`fedsim list KIND` shows every setting of a kind; there are also {', '.join(SECTIONS)}",
        highlight=False,
    )


def _print_settings(name: str, settings: type[Schema], console: Console) -> None:
    about = " ".join((settings.__doc__ or "").split("\n\n")[0].split())
    console.print(f"[bold]{name}[/bold]: {escape(about)}", highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for field, info in settings.model_fields.items():
        if field != "name" or name in SECTIONS:
            table.add_row(f"  {field}", escape(_default(info)), escape(" ".join((info.description or "").split())))
    console.print(table)


def _default(info: Any) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    if isinstance(default, Schema):
        return str(getattr(default, "name", "")) or "…"
    return "null" if default is None else str(default)
