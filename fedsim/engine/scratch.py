"""The temporary folder of one driver; what drivers that were killed have left is removed by the next."""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "fedsim-"
LOCK = "driver.lock"
YOUNG_SECONDS = 60
"""A folder may be younger than this before its driver holds the lock."""


class Scratch:
    """A folder that belongs to this process for as long as it holds a lock on a file in it."""

    def __init__(self) -> None:
        """Remove what dead drivers have left, and make a folder of one's own."""
        remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder and give up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned(where: Path) -> None:
    """Remove the folders of drivers that are gone: those whose lock nobody holds."""
    for lock in where.glob(f"{PREFIX}*/{LOCK}"):
        try:
            if time.time() - lock.stat().st_mtime < YOUNG_SECONDS:
                continue
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # held, another user's, or gone in this moment
            continue
