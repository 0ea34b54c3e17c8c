"""`fedsim run` and `fedsim validate`: one simulation."""

import argparse
from argparse import Namespace
from functools import partial

from fedsim.commands.base import draw_partition_of, make_console, settings_argument, split_settings, work_options
from fedsim.errors import ConfigError


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim run`."""
    settings_argument(parser)
    work_options(parser)
    parser.add_argument("--seed", type=int, help="seed of everything random (default: the config's)")


def run(options: Namespace) -> int:
    """Run one simulation."""
    from fedsim import plan
    from fedsim.config import load_config
    from fedsim.progress import reporter
    from fedsim.simulation import Simulation
    from fedsim.tracking import Tracker, check_store, resolve_uri

    path, overrides = split_settings(options.settings)
    if options.seed is not None:
        overrides.append(f"seed={options.seed}")
    config = load_config(path, overrides)
    folder = options.output / config.name
    simulation = Simulation(config, output=folder, data_dir=options.data_dir, address=options.address)
    console = make_console()
    if options.dry_run:
        plan.print_plan(config, [simulation.prepared], console)
        return 0
    simulation.check_output(options.resume)
    if config.tracking.uri != "off":
        uri = resolve_uri(config.tracking.uri, options.output)
        check_store(uri)
        simulation.tracker = partial(Tracker, uri, config.tracking.experiment, options.output / "mlartifacts")
    with reporter(console) as simulation.reporter:
        result = simulation.run(options.resume)
    draw_partition_of(simulation.prepared, folder / "partition.png")
    plan.print_result(result, folder, console)
    return 0


def validate_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim validate`."""
    settings_argument(parser, "the YAML file to check")


def validate(options: Namespace) -> int:
    """Check a config and start nothing."""
    from fedsim.comparison_config import parse_comparison
    from fedsim.config import load_config
    from fedsim.settings import read_yaml

    path, overrides = split_settings(options.settings)
    if path is None:
        raise ConfigError("name the YAML file to check")
    data = read_yaml(path)
    if "tables" in data:
        cells = parse_comparison(data, str(path)).cells()
        print(f"{path}: a valid comparison of {len(cells)} cells")
    elif {"space", "alternatives", "comparison"} & data.keys():
        from fedsim.sweep.config import check_sweep, load_sweep_config

        sweep = load_sweep_config(path)
        check_sweep(sweep)
        print(f"{path}: a valid sweep, {sweep.name}, over {len(sweep.seeds)} seed(s)")
    else:
        config = load_config(path, overrides)
        print(f"{path}: a valid simulation, {config.name}: {config.federation.rounds} rounds")
    return 0
