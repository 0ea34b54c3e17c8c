"""Checkpoints: atomic, few, and loaded without executing anything (safetensors)."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsim.engine.pool import Faults
from fedsim.engine.server import Arrays
from fedsim.files import write_atomically

KEEP = 2
RECORDS = "records"
"""Name, among the arrays, of all that is none, as JSON: metadata lie in a header that ends at 100 MB."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a simulation has come to.

    Attributes:
        rounds_done: Rounds behind it.
        state: What the server remembers.
        history: The records of these rounds.
        faults: What went wrong in them and was repaired.
        rounds_by_wire: How many of them wires carried.
    """

    rounds_done: int
    state: Arrays
    history: list[dict[str, Any]]
    faults: Faults = field(default_factory=Faults)
    rounds_by_wire: int = 0


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
        records = {**vars(checkpoint), "faults": asdict(checkpoint.faults)}
        arrays = {name: np.asarray(array, order="C") for name, array in records.pop("state").items()}
        arrays[RECORDS] = np.frombuffer(json.dumps(records).encode(), np.uint8)
        metadata = {"fingerprint": self.fingerprint, "sha256": _digest(arrays)}
        write_atomically(path, save(arrays, metadata))
        # Only older ones are counted and removed: newer ones are damaged or foreign, and will be overwritten.
        for old in [other for other in self._files() if _rounds(other) < checkpoint.rounds_done][: -(KEEP - 1)]:
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
        """Return the checkpoints by their rounds; a name that tells none is not one."""
        return sorted(
            (p for p in self.folder.glob("round-*.safetensors") if p.stem.removeprefix("round-").isdecimal()),
            key=_rounds,
        )

    def _load(self, path: Path, foreign: bool = False) -> Checkpoint:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "sha256" not in metadata:
                raise ValueError("another program or version wrote it")
            if metadata["fingerprint"] != self.fingerprint and not foreign:
                raise ValueError("it belongs to another experiment")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(arrays) != metadata["sha256"]:
            raise ValueError("its content has changed since it was written")
        records = json.loads(arrays.pop(RECORDS).tobytes())
        return Checkpoint(state=arrays, **{**records, "faults": Faults(**records["faults"])})


def _rounds(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
