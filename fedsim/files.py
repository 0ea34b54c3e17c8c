"""Output files and folders: files are written whole or not at all, and a folder belongs to one thing."""

import os
from collections.abc import Callable
from pathlib import Path

from fedsim.errors import ConfigError, RunError

UNFINISHED = ".tmp"
"""How the names of files end that are still being written: what a killed process leaves of one is nothing."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or none: to a temporary name, flushed to disk, then renamed.

    Raises:
        RunError: If it cannot be written; a file that was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def check_folder(
    folder: Path, mark: str, kind: str, is_same: Callable[[Path], bool], resume: bool, rename: str = "name"
) -> None:
    """See that an output folder is free, or holds the same thing and may be gone on with; nothing is written.

    Args:
        folder: The folder.
        mark: Name of the file in it that tells what it holds.
        kind: What is to be kept there, e.g. "sweep".
        is_same: Whether that file tells of the very thing that is to be kept there.
        resume: Whether to go on with it.
        rename: How the user chooses another folder, beside `--output`.

    Raises:
        ConfigError: If it holds something else, or the same and `resume` was not asked for, or cannot be written.
    """
    saved, instead = folder / mark, f"choose another {rename} or --output"
    if os.path.exists(saved):
        if not is_same(saved):
            raise ConfigError(f"{folder} holds another {kind}; {instead}")
        if not resume:
            raise ConfigError(f"{folder} holds this {kind} already; --resume goes on with it, or {instead}")
        return
    # Path.exists would raise where a folder above may not be looked into.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.R_OK | os.W_OK | os.X_OK)):
        raise ConfigError(f"{folder}: no files can be written there: {there} is no folder that you may write to")
    if there == folder and not all(_is_unfinished(path) for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no {kind}; {instead}")


def _is_unfinished(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(UNFINISHED)
