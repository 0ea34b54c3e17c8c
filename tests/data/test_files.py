import gzip
import hashlib
import os
import shutil
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest

from fedsim.data import files
from fedsim.data.files import data_folder, obtain
from fedsim.errors import ConfigError


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def fake_download(monkeypatch, tmp_path_factory, tiny):
    """Let a download deliver the tiny files; returns an empty data folder and the list of downloads."""
    calls = []

    def fetch(torchvision_class, folder):
        calls.append(torchvision_class)
        shutil.copytree(tiny, folder, dirs_exist_ok=True)

    monkeypatch.setattr(files, "_fetch", fetch)
    return tmp_path_factory.mktemp("empty"), calls


def test_folder_is_the_argument_then_the_environment_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv(files.DATA_DIR_VARIABLE, "~/mine")
    assert str(data_folder(tmp_path)) == str(tmp_path)
    assert str(data_folder(None)) == "/home/somebody/mine"
    monkeypatch.delenv(files.DATA_DIR_VARIABLE)
    assert str(data_folder(None)) == "/home/somebody/.cache/fedsim/data"
    monkeypatch.setenv(files.DATA_DIR_VARIABLE, "relative")
    assert data_folder(None).is_absolute()


def test_idx_files_are_read(tiny):
    arrays = obtain("mnist", tiny, download=False)
    assert arrays.train_images.shape == (30, 1, 28, 28) and arrays.test_images.shape == (10, 1, 28, 28)
    assert arrays.train_images.dtype == np.uint8 and arrays.train_labels.dtype == np.int64
    assert arrays.train_labels.tolist() == [*range(10)] * 3
    expected = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    assert np.array_equal(arrays.train_images[:, 0], expected)


def test_cifar_batches_are_read_in_order(tiny):
    arrays = obtain("cifar10", tiny, download=False)
    assert arrays.train_images.shape == (50, 3, 32, 32) and arrays.test_images.shape == (10, 3, 32, 32)
    # The first three values of a CIFAR row are neighbours in the red plane.
    assert arrays.train_images[::10, 0, 0, :3].tolist() == [[i, i + 1, i + 2] for i in range(5)]
    assert arrays.test_images[0, :, 0, 0].tolist() == [5, 0, 0]
    assert arrays.test_labels.tolist() == [*range(10)]


@pytest.mark.parametrize("name", files.FILE_SETS)
@pytest.mark.parametrize("harm", ["truncate", "empty", "flip", "foreign"])
def test_a_damaged_file_is_named(tiny, name, harm):
    file = tiny / list(files.FILE_SETS[name].md5)[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    harmed = {"truncate": content[: len(content) // 2], "empty": b"", "flip": content, "foreign": b"<html>"}
    file.write_bytes(harmed[harm])
    with pytest.raises(ConfigError) as caught:
        obtain(name, tiny, download=True)
    assert str(file) in str(caught.value) and "is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_pickle_is_opened_before_its_digest_is_known(tiny):
    file = tiny / "cifar-10-batches-py" / "data_batch_1"
    file.write_bytes(b"cos\nsystem\n(S'touch " + str(tiny / "executed").encode() + b"'\ntR.")
    with pytest.raises(ConfigError, match="damaged"):
        obtain("cifar10", tiny, download=False)
    assert not (tiny / "executed").exists()


def test_a_missing_file_is_named(tiny):
    file = tiny / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.unlink()
    with pytest.raises(ConfigError) as caught:
        obtain("mnist", tiny, download=False)
    message = str(caught.value)
    assert f"{file}, which does not exist" in message
    assert "--data-dir" in message and "FEDSIM_DATA_DIR" in message


@pytest.mark.parametrize("name", files.FILE_SETS)
def test_without_network_the_error_says_what_to_do(tmp_path, no_network, name):
    before = socket.getdefaulttimeout()
    with pytest.raises(ConfigError) as caught:
        obtain(name, tmp_path / "new", download=True)
    message = str(caught.value)
    assert message.startswith(f"data: cannot download {name} to {tmp_path / 'new'}")
    assert "no route to host" in message and "--data-dir" in message and "\n" not in message
    assert list((tmp_path / "new").iterdir()) == []
    assert socket.getdefaulttimeout() == before


def test_a_download_arrives_in_the_data_folder(fake_download):
    root, calls = fake_download
    assert len(obtain("mnist", root, download=True).train_labels) == 30
    assert len(obtain("mnist", root, download=True).train_labels) == 30
    assert calls == ["MNIST"]
    assert [path.name for path in root.iterdir()] == ["MNIST"]


def test_a_download_overwrites_nothing(fake_download):
    root, calls = fake_download
    own = root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="damaged"):
        obtain("mnist", root, download=True)
    assert own.read_bytes() == b"mine" and calls == ["MNIST"]


def test_an_interrupted_download_leaves_nothing(fake_download, monkeypatch):
    root, _ = fake_download

    def interrupted(_torchvision_class, folder):
        (folder / "half").write_bytes(b"...")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        obtain("mnist", root, download=True)
    assert list(root.iterdir()) == []


def test_archives_in_the_folder_are_unpacked_without_network(tiny, no_network, monkeypatch):
    from torchvision import datasets

    resources = []
    for file in sorted((tiny / "MNIST" / "raw").iterdir()):
        packed = gzip.compress(file.read_bytes())
        file.with_name(f"{file.name}.gz").write_bytes(packed)
        file.unlink()
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    assert len(obtain("mnist", tiny, download=True).train_labels) == 30


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot download mnist"):
        obtain("mnist", tmp_path / "file", download=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tiny):
    (tiny / "MNIST" / "raw" / "train-images-idx3-ubyte").chmod(0)
    with pytest.raises(ConfigError, match="cannot read mnist"):
        obtain("mnist", tiny, download=False)


def test_digests_and_names_are_torchvisions():
    from torchvision import datasets

    for name, known in files.FILE_SETS.items():
        assert hasattr(datasets, known.torchvision_class), name
    cifar = dict(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list)
    assert files.FILE_SETS["cifar10"].md5 == {f"cifar-10-batches-py/{file}": cifar[file] for file in cifar}
    for name, cls in (("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)):
        published = [f"{cls.__name__}/raw/{file}" for file, _ in cls.resources]
        assert list(files.FILE_SETS[name].archives) == published


def test_real_files_are_read_as_torchvision_reads_them(real_data):
    from torchvision import datasets

    for name, cls in (("mnist", datasets.MNIST), ("cifar10", datasets.CIFAR10)):
        theirs, ours = cls(real_data, train=False), obtain(name, real_data, download=False)
        images = np.asarray(theirs.data).reshape(len(theirs), *ours.test_images.shape[2:], -1)
        assert np.array_equal(ours.test_images.transpose(0, 2, 3, 1), images)
        assert ours.test_labels.tolist() == [int(label) for label in theirs.targets]
