"""Data sets as uint8 arrays: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10, and a user's own."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedsim.data.files import Arrays, obtain
from fedsim.data.images import reshape_images, scale_images
from fedsim.data.partitions import IIDConfig, PartitionConfig
from fedsim.errors import ConfigError
from fedsim.plugins import load_attribute
from fedsim.randomness import Purpose, numpy_stream
from fedsim.schema import Schema

T = TypeVar("T", bound=np.generic)

CLASS_NAMES = {
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory; its arrays are contiguous and read-only, here as in Ray's object store.

    Attributes:
        name: Its name in the settings.
        train_images: uint8 [N, C, H, W].
        train_labels: int64 [N].
        test_images: uint8 [M, C, H, W].
        test_labels: int64 [M].
        class_names: One name a class.
        fingerprint: SHA-256 of the four arrays and their shapes, in hexadecimal.
    """

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


class _DatasetSettings(Schema):
    name: str
    partition: PartitionConfig = IIDConfig()
    """How the training images are divided among the clients."""
    shape: Literal["native", "1x28x28", "3x32x32"] = "native"
    """Image shape C×H×W; colours become grey by luma, grey is copied, sizes change bilinearly."""


class _FilesConfig(_DatasetSettings):
    def arrays(self, data_dir: Path | None, download: bool) -> tuple[Arrays, tuple[str, ...]]:
        """Return the arrays and class names."""
        return obtain(self.name, data_dir, download), CLASS_NAMES[self.name]


class DigitsConfig(_DatasetSettings):
    """Scikit-learn's handwritten digits, 8×8, scaled to 1×28×28: needs no download.

    The 17 grey levels are spread over 0–255 and enlarged bicubically. Every fifth image of a fixed shuffle
    within each class is a test image: 1,437 for training and 360 for testing, whatever the run's seed.

    Source:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
    """

    name: Literal["digits"] = "digits"

    def arrays(self, data_dir: Path | None, download: bool) -> tuple[Arrays, tuple[str, ...]]:
        """Return the arrays and class names; both arguments are ignored."""
        pixels, labels = _read_digits()
        coarse = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        images = scale_images(coarse, (28, 28), "bicubic")
        shuffled = numpy_stream(0, Purpose.DATA_SPLIT).permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        test = np.sort(by_class[::5])
        train = np.setdiff1d(by_class, test)
        return Arrays(images[train], labels[train], images[test], labels[test]), CLASS_NAMES[self.name]


def _read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return pixels, 0 to 16, [1797, 64], and labels [1797], as `sklearn.datasets.load_digits` does.

    Its file is read here, because importing scikit-learn would be a second of every run's start.
    """
    package = find_spec("sklearn")
    assert package and package.origin
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


class MNISTConfig(_FilesConfig):
    """MNIST: 60,000 + 10,000 handwritten digits, 1×28×28 (LeCun et al., 1998)."""

    name: Literal["mnist"] = "mnist"


class FashionMNISTConfig(_FilesConfig):
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 1×28×28 (Xiao, Rasul and Vollgraf, 2017)."""

    name: Literal["fashion_mnist"] = "fashion_mnist"


class CIFAR10Config(_FilesConfig):
    """CIFAR-10: 50,000 + 10,000 photographs, 3×32×32 (Krizhevsky, 2009)."""

    name: Literal["cifar10"] = "cifar10"


class CustomDatasetConfig(_DatasetSettings):
    """A data set of your own, from a function that returns its arrays."""

    name: Literal["custom"] = "custom"
    factory: str
    """`module:function`, called with `options`; it returns `(train_images, train_labels, test_images,
    test_labels)`: images uint8 [N, C, H, W] or [N, H, W], labels integers from 0, [N]."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments handed to the factory."""
    class_names: tuple[str, ...] = ()
    """One name a class; by default the numbers from 0 to the largest label."""

    def arrays(self, data_dir: Path | None, download: bool) -> tuple[Arrays, tuple[str, ...]]:
        """Call the user's factory and check what it returns; both arguments are ignored.

        Raises:
            ConfigError: If the factory cannot be found or returns something else.
        """
        parts = load_attribute(self.factory)(**self.options)
        if not (isinstance(parts, tuple | list) and len(parts) == 4):
            raise ConfigError(
                f"data.factory: {self.factory} must return four arrays: images and labels to train, to test"
            )
        images = [self._images(part) for part in parts[::2]]
        labels = [self._labels(part) for part in parts[1::2]]
        if [len(part) for part in images] != [len(part) for part in labels] or not all(map(len, labels)):
            raise ConfigError(f"data.factory: {self.factory} returned not one label an image, or none at all")
        if images[0].shape[1:] != images[1].shape[1:]:
            raise ConfigError(f"data.factory: {self.factory} returned images of two shapes")
        classes = 1 + max(int(part.max()) for part in labels)
        names = self.class_names or tuple(map(str, range(classes)))
        if len(names) < classes:
            raise ConfigError(f"data.class_names: {len(names)} names for {classes} classes")
        return Arrays(images[0], labels[0], images[1], labels[1]), names

    def _images(self, part: Any) -> NDArray[np.uint8]:
        images: NDArray[Any] = np.asarray(part)
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise ConfigError(
                f"data.factory: {self.factory} returned images of type {images.dtype} {list(images.shape)}; "
                "they must be uint8, 0 to 255, [N, C, H, W] or [N, H, W]"
            )
        return images[:, None] if images.ndim == 3 else images

    def _labels(self, part: Any) -> NDArray[np.int64]:
        labels: NDArray[Any] = np.asarray(part)
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or (labels < 0).any():
            raise ConfigError(
                f"data.factory: {self.factory} returned labels of type {labels.dtype} {list(labels.shape)}; "
                "they must be integers from 0, [N]"
            )
        return labels.astype(np.int64)


DatasetConfig = Annotated[
    DigitsConfig | MNISTConfig | FashionMNISTConfig | CIFAR10Config | CustomDatasetConfig,
    Field(discriminator="name"),
]


def dataset_key(config: DatasetConfig) -> str:
    """Return a text that is the same for configs of the same images, however these are split."""
    return f"{config.name} {config.shape} {config.model_dump_json(exclude={'partition'})}"


def load_dataset(config: DatasetConfig, data_dir: Path | None = None, download: bool = True) -> Dataset:
    """Load a data set, downloading it first if that is needed and allowed.

    Args:
        config: Which one, and the image shape.
        data_dir: Folder in torchvision's layout, and where downloads go; by default the environment's
            FEDSIM_DATA_DIR, else ~/.cache/fedsim/data.
        download: Whether missing files may be downloaded, with torchvision's progress bar.

    Raises:
        ConfigError: If files are missing, damaged or unreachable, or a factory returns something else.
    """
    arrays, class_names = config.arrays(data_dir, download)
    train_images, test_images = arrays.train_images, arrays.test_images
    if config.shape != "native":
        channels, height, width = map(int, config.shape.split("x"))
        train_images = reshape_images(train_images, (channels, height, width))
        test_images = reshape_images(test_images, (channels, height, width))
    parts = Arrays(
        _frozen(train_images), _frozen(arrays.train_labels), _frozen(test_images), _frozen(arrays.test_labels)
    )
    return Dataset(config.name, *parts, class_names=class_names, fingerprint=_fingerprint(parts))


def _frozen(part: NDArray[T]) -> NDArray[T]:
    # A view, so that an array that a user's factory returned stays writable for the user.
    view = np.ascontiguousarray(part).view()
    view.flags.writeable = False
    return view


def _fingerprint(parts: Arrays) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part.shape).encode())
        digest.update(part.data)
    return digest.hexdigest()


def root_set(dataset: Dataset, per_class: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Set training images aside, before they are divided among clients, as the public root set.

    Args:
        dataset: Where from.
        per_class: Images of each class to set aside; 0 sets none aside.
        seed: Seed of the run.

    Returns:
        Indices into the training set, ascending: the root set [per_class × classes], and all others.

    Raises:
        ConfigError: If a class has no more than `per_class` training images.

    Source:
        GradDefense's published code uses 5 a class, out of the training images that its clients hold, too;
        here no client holds them.
    """
    totals = np.bincount(dataset.train_labels, minlength=dataset.classes)
    if per_class and totals.min() <= per_class:
        name = dataset.class_names[int(totals.argmin())]
        raise ConfigError(f"data: a root set of {per_class} images a class, but {name!r} has {totals.min()}")
    shuffled = numpy_stream(seed, Purpose.ROOT_SET).permutation(len(dataset.train_labels))
    by_class = shuffled[np.argsort(dataset.train_labels[shuffled], kind="stable")]
    starts = np.cumsum(totals) - totals
    root = np.sort(by_class[(starts[:, None] + np.arange(per_class)).ravel()])
    return root, np.setdiff1d(by_class, root)


def mean_image(dataset: Dataset) -> NDArray[np.float32]:
    """Return the mean training image, float32 [C, H, W] in [0, 1]: the best guess that knows nothing."""
    total = dataset.train_images.sum(axis=0, dtype=np.float64)
    mean: NDArray[np.float32] = (total / (255 * len(dataset.train_images))).astype(np.float32)
    return mean
