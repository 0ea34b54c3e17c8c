"""The commands of the command line, each with its options. Heavy modules are imported when a command runs."""

import argparse
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.comparison import ComparisonConfig
    from fedsim.simulation import Prepared

DEFAULT_OUTPUT = Path("runs")


@dataclass(frozen=True)
class Command:
    """A command: its name, one line of help, its options and what it does."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    handler: Callable[[Namespace], int]


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _settings_argument(parser)
    _work_options(parser)
    parser.add_argument("--seed", type=int, help="seed of everything random (default: the config's)")


def _settings_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG|key=value",
        help="a YAML file (default: the documented defaults) and settings by dotted path, e.g. defense.sigma=0.1",
    )


def _split_settings(settings: list[str]) -> tuple[Path | None, list[str]]:
    files = [text for text in settings if "=" not in text]
    if len(files) > 1:
        raise ConfigError(f"one config file at most, got {' and '.join(files)}; settings are written key=value")
    return Path(files[0]) if files else None, [text for text in settings if "=" in text]


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="quick", help="quick, paper, or a YAML file (default: quick)")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="only these data sets")
    parser.add_argument("--defense", nargs="+", metavar="NAME", help="only these defenses")
    parser.add_argument("--attack", nargs="+", metavar="TABLE", help="only these tables (dga, gia)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1")
    seeds.add_argument("--seed", type=int, help="this one seed")
    parser.add_argument("--name", help="name of the comparison and its folder (default: made from the choice)")
    _work_options(parser)


def _work_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="output root (default: runs)"
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="data sets in torchvision's layout (or FEDSIM_DATA_DIR)"
    )
    parser.add_argument("--address", help="Ray cluster to run on (default: a private Ray on this machine)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")


def _store_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="output root (default: runs)"
    )
    parser.add_argument("--tracking-uri", help="MLflow store (default: mlflow.db in the output root)")


def _reading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="name of the comparison (default: the newest)")
    _store_options(parser)


def _ui_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="port on loopback (default: 5000)")
    _store_options(parser)


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", help="one kind only, with its settings (e.g. defenses)")


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    _settings_argument(parser)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if os.isatty(1) else 110)


def _run(options: Namespace) -> int:
    from fedsim import plan
    from fedsim.config import load_config
    from fedsim.progress import reporter
    from fedsim.simulation import Simulation
    from fedsim.tracking import Tracker, resolve_uri

    path, overrides = _split_settings(options.settings)
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    config = load_config(path, overrides)
    folder = options.output / config.name
    simulation = Simulation(config, output=folder, data_dir=options.data_dir, address=options.address)
    console = _console()
    if options.dry_run:
        plan.print_plan(config, [simulation.prepared], console)
        return 0
    simulation.check_output(options.resume)
    if config.tracking.uri != "off":
        uri = resolve_uri(config.tracking.uri, options.output)
        simulation.tracker = Tracker(uri, config.tracking.experiment, options.output / "mlartifacts")
    with reporter(console) as simulation.reporter:
        result = simulation.run(options.resume)
    _draw_partition(simulation.prepared, folder / "partition.png")
    plan.print_result(result, folder, console)
    return 0


def _draw_partition(prepared: "Prepared", path: Path) -> None:
    from analysis.partition_figure import draw_partition

    dataset = prepared.dataset
    counts = prepared.spec.partition.counts(dataset.train_labels, dataset.classes)
    draw_partition(counts, dataset.class_names, path)


def _compare(options: Namespace) -> int:
    from fedsim import plan
    from fedsim.comparison import Comparison
    from fedsim.progress import reporter

    comparison = Comparison(_chosen(options), options.output, options.data_dir, options.address)
    console = _console()
    if options.dry_run:
        plan.print_comparison_plan(comparison, console)
        return 0
    with reporter(console) as comparison.reporter:
        for _ in comparison.run(options.resume):
            pass
    for dataset, prepared in comparison.by_dataset().items():
        _draw_partition(prepared, comparison.folder / "figures" / f"partition_{dataset}.png")
    _write_report(comparison.tracking_uri, comparison.config.name, options.output, console)
    for name, reason in comparison.failures.items():
        console.print(f"failed: {name}: {reason} (--resume tries it again)", style="red", highlight=False)
    return 1 if comparison.failures else 0


def _chosen(options: Namespace) -> "ComparisonConfig":
    """Return the preset narrowed to what the options name, under a name that says so."""
    from fedsim.comparison import load_comparison_config, narrow

    config = load_comparison_config(options.preset)
    seeds = range(options.seeds) if options.seeds else None if options.seed is None else [options.seed]
    return narrow(config, options.dataset, options.defense, options.attack, seeds, options.name)


def _write_report(uri: str, name: str | None, root: Path, console: Any) -> None:
    from analysis import write_all
    from analysis.load import load_comparison
    from analysis.tables import print_tables

    comparison = load_comparison(uri, name)
    print_tables(comparison, console)
    folder = root / comparison.name
    written = write_all(uri, comparison.run_id, folder)
    console.print(
        f"wrote {len(written)} files to {folder}; the summary is {folder / 'report.html'}", soft_wrap=True
    )


def _tables(options: Namespace) -> int:
    from analysis.load import load_comparison
    from analysis.tables import print_tables

    print_tables(load_comparison(_store(options), options.name), _console())
    return 0


def _report(options: Namespace) -> int:
    _write_report(_store(options), options.name, options.output, _console())
    return 0


def _store(options: Namespace) -> str:
    """Return the MLflow store to read; ConfigError if there is none yet."""
    if options.tracking_uri:
        return str(options.tracking_uri)
    database = options.output / "mlflow.db"
    if not database.exists():
        raise ConfigError(f"{database}: no results here yet; --output names the root that runs were written to")
    return f"sqlite:///{database.resolve()}"


def _ui(options: Namespace) -> int:
    import subprocess
    import sys

    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", _store(options)]
    print(f"MLflow at http://127.0.0.1:{options.port} (Ctrl-C ends it)")
    return subprocess.call([*command, "--host", "127.0.0.1", "--port", str(options.port)])


def _list(options: Namespace) -> int:
    from fedsim.catalogue import print_catalogue

    print_catalogue(options.kind, _console())
    return 0


def _validate(options: Namespace) -> int:
    from fedsim.comparison import parse_comparison
    from fedsim.config import load_config, read_yaml

    path, overrides = _split_settings(options.settings)
    if path is None:
        raise ConfigError("name the YAML file to check")
    data = read_yaml(path)
    if "tables" in data:
        cells = parse_comparison(data, str(path)).cells()
        print(f"{path}: a valid comparison of {len(cells)} cells")
    else:
        config = load_config(path, overrides)
        print(f"{path}: a valid simulation, {config.name}: {config.federation.rounds} rounds")
    return 0


ALL = (
    Command("run", "one simulation: training under a defense, audited by attacks", _run_arguments, _run),
    Command("compare", "the tables: defenses × attacks × data sets", _compare_arguments, _compare),
    Command("tables", "print the tables of a comparison again, from MLflow", _reading_arguments, _tables),
    Command("report", "write tables, figures and report.html again, from MLflow", _reading_arguments, _report),
    Command("ui", "browse results in MLflow's web page, on loopback", _ui_arguments, _ui),
    Command(
        "list", "what a config can name: data sets, models, defenses, attacks, presets", _list_arguments, _list
    ),
    Command("validate", "check a config without running it", _validate_arguments, _validate),
)
