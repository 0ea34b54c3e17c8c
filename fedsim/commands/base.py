"""What a command of the command line is, and the options that several share."""

import argparse
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.preparation import Prepared

DEFAULT_OUTPUT = Path("runs")


@dataclass(frozen=True)
class Command:
    """A command: its name, one line of help, its options and what it does."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    handler: Callable[[Namespace], int]


def settings_argument(
    parser: argparse.ArgumentParser, file: str = "a YAML file (default: the documented defaults)"
) -> None:
    """Take a config file, which `file` describes, and `key=value` settings."""
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG|key=value",
        help=f"{file} and settings by dotted path, e.g. defense.sigma=0.1",
    )


def split_settings(settings: list[str]) -> tuple[Path | None, list[str]]:
    """Return the config file, if one is named, and the settings; ConfigError if there are two files."""
    files = [text for text in settings if "=" not in text]
    if len(files) > 1:
        raise ConfigError(f"one config file at most, got {' and '.join(files)}; settings are written key=value")
    return Path(files[0]) if files else None, [text for text in settings if "=" in text]


def work_options(parser: argparse.ArgumentParser) -> None:
    """Take the options of every command that starts work."""
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="output root (default: runs)"
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="data sets in torchvision's layout (or FEDSIM_DATA_DIR)"
    )
    parser.add_argument("--address", help="Ray cluster to run on (default: a private Ray on this machine)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, print the plan, no more")


def store_options(parser: argparse.ArgumentParser) -> None:
    """Take the options that say where results lie."""
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="output root (default: runs)"
    )
    parser.add_argument("--tracking-uri", help="MLflow store (default: mlflow.db in the output root)")


def store_uri(options: Namespace) -> str:
    """Return the MLflow store to read; ConfigError if there is none yet."""
    if options.tracking_uri:
        return str(options.tracking_uri)
    database = options.output / "mlflow.db"
    if not database.exists():
        raise ConfigError(f"{database}: no results here yet; --output names the root that runs were written to")
    return f"sqlite:///{database.resolve()}"


def make_console() -> Any:
    """Return the console to print on; a pipe gets a fixed width."""
    from rich.console import Console

    return Console(width=None if os.isatty(1) else 110)


def draw_partition_of(prepared: "Prepared", path: Path) -> None:
    """Draw which client holds how many images of each class."""
    from analysis.partition_figure import draw_partition

    dataset = prepared.dataset
    counts = prepared.spec.partition.counts(dataset.train_labels, dataset.classes)
    draw_partition(counts, dataset.class_names, path)
