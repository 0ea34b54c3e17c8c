"""The command line: `fedsim …`. Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedsim.errors import FedsimError

EPILOG = "exit codes: 0 done, 1 failed while running (resumable), 2 bad input (no work done), 130 interrupted"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one stretch only; overrides may stand after an option, too.
    if rest and (not hasattr(options, "settings") or any(text.startswith("-") for text in rest)):
        parser.error(f"unknown argument: {rest[0]}")
    if rest:
        options.settings += rest
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # A user's own module:function may lie in the working directory, as with `python -m`.
    sys.path.append(str(Path.cwd()))
    try:
        return int(options.handler(options))
    except FedsimError as error:
        print(f"fedsim {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"fedsim {options.command}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    # The commands' modules pull in Ray and PyTorch, so each is imported only when its command runs.
    from fedsim import commands

    parser = _Parser(prog="fedsim", description=__import__("fedsim").__doc__, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in commands.ALL:
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help, epilog=EPILOG)
        command.arguments(sub)
        sub.set_defaults(handler=command.handler)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fedsim {version('fedsim')}"
    except PackageNotFoundError:
        return "fedsim, not installed"
