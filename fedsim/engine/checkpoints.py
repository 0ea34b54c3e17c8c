"""Checkpoints: atomic, few, and loaded without executing anything (safetensors)."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsim.engine.server import Arrays
from fedsim.files import write_atomically

KEEP = 2
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The server's state after `rounds_done` rounds, with the records of these rounds."""

    rounds_done: int
    state: Arrays
    history: list[dict[str, Any]]


class CheckpointFolder:
    """The checkpoints of one run; `fingerprint` tells them from another experiment's."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Use `folder`, created on the first save."""
        self.folder, self.fingerprint = folder, fingerprint

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint so that a crash at any moment leaves either all of it or none.

        Raises:
            RunError: If the disk is full or not writable; older checkpoints stay as they are.
        """
        path = self.folder / f"round-{checkpoint.rounds_done:06d}.safetensors"
        metadata = {
            "fingerprint": self.fingerprint,
            "rounds_done": str(checkpoint.rounds_done),
            "history": json.dumps(checkpoint.history),
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in checkpoint.state.items()}
        write_atomically(path, save(arrays, metadata))
        # Only older ones are counted and removed: newer ones are damaged or foreign, and will be overwritten.
        for old in [other for other in self._files() if other < path][: -(KEEP - 1)]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> Checkpoint | None:
        """Return the newest sound checkpoint of this experiment; damaged or foreign ones are named in the log."""
        for path in reversed(self._files()):
            try:
                return self._load(path)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                log.warning("%s is not a checkpoint of this run (%s); using the one before it", path, error)
        return None

    def adopt(self) -> None:
        """Make the checkpoints that lie here this run's, whoever's they were."""
        for path in self._files():
            self.save(self._load(path, foreign=True))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.safetensors"))

    def _load(self, path: Path, foreign: bool = False) -> Checkpoint:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata["fingerprint"] != self.fingerprint and not foreign:
                raise ValueError("it belongs to another experiment")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Checkpoint(int(metadata["rounds_done"]), state, json.loads(metadata["history"]))
