"""The commands that read what MLflow holds, and `fedsim list`."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from fedsim.commands.base import make_console, store_options, store_uri
from fedsim.errors import ConfigError


def reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim tables` and `fedsim report`."""
    parser.add_argument("name", nargs="?", help="name of the comparison or sweep (default: the newest)")
    store_options(parser)


def tables(options: Namespace) -> int:
    """Print the tables of a comparison."""
    from analysis.load import load_comparison
    from analysis.tables import print_tables

    print_tables(load_comparison(store_uri(options), options.name), make_console())
    return 0


def report(options: Namespace) -> int:
    """Write the report of a comparison or sweep."""
    from analysis.load import kind_of

    uri = store_uri(options)
    write = write_sweep_report if kind_of(uri, options.name) == "sweep" else write_report
    write(uri, options.name, options.output, make_console())
    return 0


def write_sweep_report(uri: str, name: str | None, root: Path, console: Any) -> None:
    """Write tables, figures and report of a sweep below `root`."""
    from analysis.sweep_report import write_sweep

    sweep, written = write_sweep(uri, name, root)
    folder = root / sweep.name
    console.print(
        f"wrote {len(written)} files to {folder}; the summary is {folder / 'report.html'}", soft_wrap=True
    )


def write_report(uri: str, name: str | None, root: Path, console: Any) -> None:
    """Print the tables and write tables, figures and report below `root`."""
    from analysis.load import load_comparison
    from analysis.tables import print_tables
    from analysis.write import write_all

    comparison = load_comparison(uri, name)
    print_tables(comparison, console)
    folder = root / comparison.name
    written = write_all(uri, comparison.run_id, folder)
    console.print(
        f"wrote {len(written)} files to {folder}; the summary is {folder / 'report.html'}", soft_wrap=True
    )


def ui_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim ui`."""
    parser.add_argument("--port", type=int, default=5000, help="port on loopback (default: 5000)")
    store_options(parser)


def ui(options: Namespace) -> int:
    """Serve MLflow's page until interrupted."""
    import subprocess
    import sys

    if not 0 < options.port < 2**16:
        raise ConfigError(f"--port: between 1 and 65535, got {options.port}")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store_uri(options)]
    print(f"MLflow at http://127.0.0.1:{options.port} (Ctrl-C ends it)")
    return subprocess.call([*command, "--host", "127.0.0.1", "--port", str(options.port)])


def catalogue_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim list`."""
    parser.add_argument("kind", nargs="?", help="one kind only, with its settings (e.g. defenses)")


def catalogue(options: Namespace) -> int:
    """Print what a config can name."""
    from fedsim.catalogue import print_catalogue

    print_catalogue(options.kind, make_console())
    return 0
