"""`fedsim sweep`: simulations over a search space, on Ray Tune."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.commands.base import make_console, work_options
from fedsim.commands.reading import write_sweep_report

if TYPE_CHECKING:
    from fedsim.sweep.outcomes import Outcome
    from fedsim.sweep.run import Sweep

SHOWN = 10
"""Points that the summary lists."""


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim sweep`."""
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="a YAML file, e.g. tune_configs/smoke.yaml")
    parser.add_argument("--seed", type=int, help="this one seed in place of the sweep's")
    parser.add_argument(
        "--storage",
        metavar="PLACE",
        help="on a cluster: a folder that all nodes share, or s3://…, for checkpoints",
    )
    work_options(parser)


def sweep(options: Namespace) -> int:
    """Run a sweep and print what it found."""
    from fedsim.sweep.config import load_sweep_config
    from fedsim.sweep.run import Sweep

    config = load_sweep_config(options.sweep)
    if options.seed is not None:
        config = config.model_copy(update={"seeds": (options.seed,)})
    console = make_console()
    job = Sweep(config, options.output, options.data_dir, options.address, console, options.storage)
    if options.dry_run:
        _print_plan(job, console)
        return 0
    outcomes = job.run(options.resume)
    _print_summary(job, outcomes, console)
    if job.tracking_uri and any(one.status == "finished" for one in outcomes):
        write_sweep_report(job.tracking_uri, config.name, options.output, console)
    return 1 if any(one.status == "failed" for one in outcomes) else 0


def _print_plan(job: "Sweep", console: Any) -> None:
    import yaml

    from fedsim.sweep.outcomes import describe
    from fedsim.sweep.resources import widest

    config = job.config
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    console.print(text, highlight=False, end="")
    for point in job.points:
        console.print(
            f"# {describe(point) or 'the base experiment'}", highlight=False, soft_wrap=True, markup=False
        )
    points = config.budget.trials if job.adaptive else len(job.points)
    size = f"{points} points × {len(config.seeds)} seeds, at most {widest(config)} workers a trial"
    console.print(
        f"# {size}; in {job.folder}",
        highlight=False,
        soft_wrap=True,
    )


def _print_summary(job: "Sweep", outcomes: "list[Outcome]", console: Any) -> None:
    from rich.table import Table

    from fedsim.sweep.outcomes import describe, ranked

    objectives = job.config.objectives
    best = ranked(outcomes, objectives)
    several = len(objectives) > 1
    table = Table(box=None, header_style="bold", title_justify="left")
    table.title = (
        "No other point beats these" if several else f"The best {min(SHOWN, len(best))} of {len(best)} points"
    )
    for objective in objectives:
        table.add_column(f"{objective.metric} ({objective.direction})", justify="right")
    table.add_column("settings")
    from rich.markup import escape

    for _, row in (best[best["pareto"]] if several else best.head(SHOWN)).iterrows():
        table.add_row(*(f"{row[o.metric]:.4g}" for o in objectives), escape(row["settings"]))
    if len(best):
        console.print(table)
    for one in outcomes:
        if one.status in ("failed", "unfinished"):
            why = f"failed: {one.reason}" if one.reason else "unfinished"
            console.print(
                f"{describe(one.point)}: {why} (--resume goes on)", style="red", highlight=False, markup=False
            )
    console.print(f"wrote {job.folder / 'trials.csv'}", highlight=False, soft_wrap=True)
