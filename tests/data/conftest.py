import dataclasses
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fedsim.data import files


@pytest.fixture
def real_data() -> Path:
    if not os.environ.get(files.DATA_DIR_VARIABLE):
        pytest.skip(f"{files.DATA_DIR_VARIABLE} names no folder with the real data sets")
    return Path(os.environ[files.DATA_DIR_VARIABLE])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Every data set of FILE_SETS, tiny, in torchvision's layout, with its digests known to fedsim."""
    rng = np.random.default_rng(0)
    for folder in ("MNIST", "FashionMNIST"):
        for split, size in (("train", 30), ("t10k", 10)):
            images = rng.integers(0, 256, (size, 28, 28), np.uint8)
            write_idx(tmp_path / folder / "raw" / f"{split}-images-idx3-ubyte", images)
            write_idx(tmp_path / folder / "raw" / f"{split}-labels-idx1-ubyte", np.arange(size) % 10)
    for number, name in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")):
        write_cifar_batch(tmp_path / "cifar-10-batches-py" / name, first_pixel=number)
    for name in files.FILE_SETS:
        register_digests(monkeypatch, name, tmp_path)
    return tmp_path


def register_digests(monkeypatch, name: str, root: Path) -> None:
    """Take the files as they are below `root` for the published ones."""
    known = files.FILE_SETS[name]
    md5 = {file: hashlib.md5((root / file).read_bytes()).hexdigest() for file in known.md5}
    monkeypatch.setitem(files.FILE_SETS, name, dataclasses.replace(known, md5=md5))


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_cifar_batch(path: Path, first_pixel: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros((10, 3072), np.uint8)
    data[:, :3] = np.arange(3) + first_pixel
    path.write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}))
