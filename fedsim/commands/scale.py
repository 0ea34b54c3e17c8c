"""`fedsim scale`: the scalability study of round time."""

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fedsim.commands.base import make_console, settings_argument, split_settings, work_options
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.scale.grid import ScaleConfig
    from fedsim.scale.study import ScaleStudy

NUMBERS = {
    "clients": "clients a round (default: 10 50 200)",
    "workers": "worker processes, with the same cohort for all: strong scaling (default: 1 2)",
    "actors": "cohorts that also run with one actor a client, as far as memory allows (default: 10)",
    "cluster": "workers of a cluster to extrapolate to (default: 1 8 64 512)",
}
SINGLE = {
    "weak": "clients a worker in weak scaling, 0 for none (default: 50)",
    "images": "images a client; clients share them when the data set is too small (default: 64)",
    "rounds": "measured rounds a cell (default: 5)",
    "warmup": "rounds before them; cohorts of 1,000 need none (default: 1)",
    "nodes": "Ray nodes on this machine to spread the workers over (default: 1)",
}


def scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the options of `fedsim scale`."""
    settings_argument(parser)
    for name, text in NUMBERS.items():
        parser.add_argument(f"--{name}", nargs="+", type=int, metavar="N", help=text)
    parser.add_argument(
        "--widths",
        nargs="+",
        metavar="N|auto",
        help="clients a worker trains at once (default: auto, as in a run)",
    )
    parser.add_argument(
        "--defenses", nargs="+", metavar="NAME", help="with default settings (default: none graddefense)"
    )
    for name, text in SINGLE.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--longest",
        type=float,
        metavar="SECONDS",
        help="start no more rounds of a cohort size after (default: 120)",
    )
    parser.add_argument("--name", help="name of the study and its folder (default: scale)")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: 0)")
    work_options(parser)


def scale(options: Namespace) -> int:
    """Measure round times and write tables and figures."""
    from analysis.scale_write import print_study, write_study
    from fedsim.progress import reporter
    from fedsim.scale.study import ScaleStudy

    config = _config(options)
    study = ScaleStudy(config, options.output, options.data_dir, options.address)
    console = make_console()
    study.check_output(options.resume or options.dry_run)
    if options.dry_run:
        _print_plan(study, console)
        return 0
    with reporter(console) as study.reporter:
        study.run(options.resume)
    written = write_study(study)
    print_study(study, console)
    console.print(f"wrote {len(written)} files to {study.folder}", highlight=False, soft_wrap=True)
    return 0


def _config(options: Namespace) -> "ScaleConfig":
    from fedsim.scale.grid import parse_scale
    from fedsim.settings import merged, parse_overrides, read_yaml

    path, overrides = split_settings(options.settings)
    chosen: dict[str, Any] = {k: getattr(options, k) for k in ("name", "seed") if getattr(options, k) is not None}
    settings = merged({} if path is None else read_yaml(path), merged(parse_overrides(overrides), chosen))
    fields = {**NUMBERS, **SINGLE, "defenses": "", "longest": ""}
    given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    if options.widths:
        given["widths"] = [_width(text) for text in options.widths]
    return parse_scale(given, settings, str(path or "settings"))


def _width(text: str) -> "int | str":
    if text == "auto" or text.isdigit():
        return text if text == "auto" else int(text)
    raise ConfigError(f"--widths: {text!r} is neither a number nor auto")


def _print_plan(study: "ScaleStudy", console: Any) -> None:
    import yaml

    from fedsim.plan import PROCESS_BYTES, of_memory

    config = study.config
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    console.print(text, highlight=False, end="")
    cells = study.pending()
    trained = sum(cell.clients * (config.rounds + config.warmup) for cell in cells)
    processes = max((cell.workers for cell in cells), default=0) + 2
    console.print(
        f"# {len(cells)} cells to measure, at most {trained:,} local trainings; up to {processes} processes, "
        f"{of_memory(processes * PROCESS_BYTES)}; output in {study.folder}",
        highlight=False,
        soft_wrap=True,
    )
