"""MNIST, Fashion-MNIST and CIFAR-10 as files: where they lie, how they get there, whether they are whole.

The layout is torchvision's, and torchvision downloads. Reading is done here because it takes a few lines,
while importing torchvision costs seconds in every process that loads data.
"""

import hashlib
import http.client
import os
import pickle
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ConfigError

DATA_DIR_VARIABLE = "FEDSIM_DATA_DIR"
DEFAULT_DATA_DIR = "~/.cache/fedsim/data"
NETWORK_TIMEOUT = 30.0
"""Seconds without an answer after which a download fails instead of waiting for ever."""


class Arrays(NamedTuple):
    """A data set as it is read: images uint8 [N, C, H, W], labels int64 [N]."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class FileSet:
    """The files of one data set, by path below the data folder.

    Attributes:
        torchvision_class: The class of `torchvision.datasets` that downloads it.
        md5: Digest of each unpacked file.
        archives: Files as they are published; one that already lies in the folder is not downloaded again.
        read: Turns a data folder that holds intact files into arrays.
    """

    torchvision_class: str
    md5: dict[str, str]
    archives: tuple[str, ...]
    read: Callable[[Path], Arrays]


def data_folder(data_dir: Path | None) -> Path:
    """Return the absolute data folder: the argument, else FEDSIM_DATA_DIR, else ~/.cache/fedsim/data."""
    chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR
    return Path(chosen).expanduser().absolute()


def obtain(name: str, data_dir: Path | None, download: bool) -> Arrays:
    """Read the data set `name`, downloading what is missing if `download` is true.

    A download is unpacked aside and moved into place file by file, so an interrupted one leaves nothing
    half-written, two at once do not disturb each other, and a file that was there is never overwritten.

    Raises:
        ConfigError: If a file is missing and cannot be downloaded, is damaged, or cannot be read.
    """
    files, root = FILE_SETS[name], data_folder(data_dir)
    try:
        missing = [file for file in files.md5 if not (root / file).is_file()]
        if missing and not download:
            raise ConfigError(
                f"data: {name} needs {root / missing[0]}, which does not exist: {_advice(files, root)}"
            )
        if missing:
            _download(name, files, root, missing)
        for file, md5 in files.md5.items():
            _verify(root / file, md5)
        return files.read(root)
    except OSError as error:
        raise ConfigError(f"data: cannot read {name} under {root} ({error}): {_advice(files, root)}") from error


def _advice(files: FileSet, root: Path) -> str:
    names = ", ".join(Path(file).name for file in files.md5)
    folder = (root / next(iter(files.md5))).parent
    return f"put {names} into {folder}, or name another data folder by --data-dir or {DATA_DIR_VARIABLE}"


def _verify(path: Path, md5: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise ConfigError(
            f"data: {path} is damaged (MD5 {found}, published {md5}): "
            "replace it, or delete it and it will be downloaded again"
        )


def _download(name: str, files: FileSet, root: Path, missing: list[str]) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder, _network_timeout():
            staging = Path(folder)
            _reuse_archives(files, root, staging)
            _fetch(files.torchvision_class, staging)
            for file in missing:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / file, root / file)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"data: cannot download {name} to {root} ({reason}): {_advice(files, root)}") from error


def _fetch(torchvision_class: str, folder: Path) -> None:
    from torchvision import datasets

    getattr(datasets, torchvision_class)(folder, download=True)


def _reuse_archives(files: FileSet, root: Path, staging: Path) -> None:
    for archive in files.archives:
        if (root / archive).is_file():
            (staging / archive).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / archive, staging / archive)


@contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read the unsigned bytes of an IDX file: two zeros, type, rank, sizes as big-endian int32, values."""
    content = np.fromfile(path, np.uint8)
    rank = int(content[3])
    sizes = content[4 : 4 + 4 * rank].view(">i4")
    return content[4 + 4 * rank :].reshape(tuple(sizes))


def _read_idx_folder(folder: Path) -> Arrays:
    def split(prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte")
        return images[:, None], _read_idx(folder / f"{prefix}-labels-idx1-ubyte").astype(np.int64)

    return Arrays(*split("train"), *split("t10k"))


def _read_cifar10(root: Path) -> Arrays:
    def split(*names: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images, labels = [], []
        for name in names:
            with (root / "cifar-10-batches-py" / name).open("rb") as file:
                # A pickle can run code; this one is known by its digest.
                batch = pickle.load(file, encoding="latin1")
            images.append(batch["data"].reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch["labels"], np.int64))
        return np.concatenate(images), np.concatenate(labels)

    return Arrays(*split(*(f"data_batch_{number}" for number in range(1, 6))), *split("test_batch"))


def _idx_file_set(torchvision_class: str, md5: dict[str, str]) -> FileSet:
    folder = f"{torchvision_class}/raw"
    return FileSet(
        torchvision_class=torchvision_class,
        md5={f"{folder}/{file}": digest for file, digest in md5.items()},
        archives=tuple(f"{folder}/{file}.gz" for file in md5),
        read=lambda root: _read_idx_folder(root / folder),
    )


FILE_SETS = {
    "mnist": _idx_file_set(
        "MNIST",
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
    ),
    "fashion_mnist": _idx_file_set(
        "FashionMNIST",
        {
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
    ),
    "cifar10": FileSet(
        torchvision_class="CIFAR10",
        md5={
            "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
            "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
            "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        },
        archives=("cifar-10-python.tar.gz",),
        read=_read_cifar10,
    ),
}
