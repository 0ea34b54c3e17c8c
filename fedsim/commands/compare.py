"""`fedsim compare`: the tables of the paper."""

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING

from fedsim.commands.base import draw_partition_of, make_console, work_options
from fedsim.commands.reading import write_report
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.comparison_config import ComparisonConfig


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim compare`."""
    parser.add_argument("--preset", default="quick", help="quick, paper, or a YAML file (default: quick)")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="only these data sets")
    parser.add_argument("--defense", nargs="+", metavar="NAME", help="only these defenses")
    parser.add_argument("--attack", nargs="+", metavar="TABLE", help="only these tables (dga, gia)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1")
    seeds.add_argument("--seed", type=int, help="this one seed")
    parser.add_argument("--name", help="name of the comparison and its folder (default: made from the choice)")
    work_options(parser)


def compare(options: Namespace) -> int:
    """Run a comparison and write its report."""
    from fedsim import plan
    from fedsim.comparison import Comparison
    from fedsim.progress import reporter

    comparison = Comparison(_chosen(options), options.output, options.data_dir, options.address)
    console = make_console()
    if options.dry_run:
        plan.print_comparison_plan(comparison, console)
        return 0
    with reporter(console) as comparison.reporter:
        for _ in comparison.run(options.resume):
            pass
    for dataset, prepared in comparison.by_dataset().items():
        draw_partition_of(prepared, comparison.folder / "figures" / f"partition_{dataset}.png")
    write_report(comparison.tracking_uri, comparison.config.name, options.output, console)
    for name, reason in comparison.failures.items():
        console.print(f"failed: {name}: {reason} (--resume tries it again)", style="red", highlight=False)
    return 1 if comparison.failures else 0


def _chosen(options: Namespace) -> "ComparisonConfig":
    """Return the preset narrowed to what the options name, under a name that says so."""
    from fedsim.comparison_config import load_comparison_config, narrow

    config = load_comparison_config(options.preset)
    if options.seeds is not None and options.seeds < 1:
        raise ConfigError(f"--seeds: at least 1, got {options.seeds}")
    seeds = range(options.seeds) if options.seeds else None if options.seed is None else [options.seed]
    return narrow(config, options.dataset, options.defense, options.attack, seeds, options.name)
