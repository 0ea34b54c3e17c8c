"""`fedsim sweep`: many simulations over a search space."""

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fedsim.commands.base import make_console, settings_argument, split_settings, work_options
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.sweep.run import Sweep


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim sweep`."""
    settings_argument(parser)
    work_options(parser)


def sweep(options: Namespace) -> int:
    """Run a sweep and print what it found."""
    from fedsim.sweep.outcome import summary
    from fedsim.sweep.plan import load_sweep
    from fedsim.sweep.run import Sweep
    from fedsim.sweep.view import make_view, print_summary

    path, overrides = split_settings(options.settings)
    if path is None:
        raise ConfigError("name the sweep's YAML file, e.g. tune_configs/smoke.yaml")
    one = Sweep(load_sweep(path, overrides), options.output, options.data_dir, options.address)
    console = make_console()
    if options.dry_run:
        _print_plan(one, console)
        return 0
    outcomes = one.run(make_view(one.config, one.plan.trials, console), options.resume)
    print_summary(summary(outcomes, one.config), one.folder, console)
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


def _print_plan(one: "Sweep", console: Any) -> None:
    """Print the resolved sweep, how many trials there are, and what they ask for."""
    import yaml

    text = yaml.safe_dump(one.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    console.print(text, highlight=False, end="")
    samples = list(one.plan.samples())
    rounds = max(sample.federation.rounds for sample in samples)
    trials = "any number of" if one.plan.trials is None else f"{one.plan.trials:,}"
    asked = ", ".join(f"{kind.workers} worker(s)" for kind in one.requests())
    console.print(
        f"# {trials} trials of up to {rounds:,} rounds, each {asked}; objectives: "
        f"{', '.join(f'{name} ({mode})' for name, mode in one.config.objectives.items())}; output in {one.folder}",
        highlight=False,
        soft_wrap=True,
    )
