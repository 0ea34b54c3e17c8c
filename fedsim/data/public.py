"""Public images: what an attacker may learn from, because no client holds them."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.data.datasets import (
    CIFAR10Config,
    Dataset,
    DigitsConfig,
    FashionMNISTConfig,
    MNISTConfig,
    load_dataset,
)
from fedsim.errors import ConfigError

PublicSource = Literal["test", "digits", "mnist", "fashion_mnist", "cifar10"]
"""Where public images come from: the test images of the clients' own data set, or all images of another one."""

SHAPES = ("1x28x28", "3x32x32")

_CONFIGS: dict[str, type[DigitsConfig | MNISTConfig | FashionMNISTConfig | CIFAR10Config]] = {
    "digits": DigitsConfig,
    "mnist": MNISTConfig,
    "fashion_mnist": FashionMNISTConfig,
    "cifar10": CIFAR10Config,
}


@dataclass(frozen=True, eq=False)
class PublicImages:
    """Images that no client holds.

    Attributes:
        images: uint8 [P, C, H, W].
        labels: int64 [P].
        fingerprint: SHA-256 of both, in hexadecimal.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    fingerprint: str

    @classmethod
    def of(cls, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> "PublicImages":
        """Take images and labels."""
        digest = hashlib.sha256(repr(images.shape).encode())
        for part in (images, labels):
            digest.update(np.ascontiguousarray(part).data)
        return cls(images, labels, digest.hexdigest())


@lru_cache(maxsize=2)
def public_images(source: PublicSource, dataset: Dataset, data_dir: Path | None = None) -> PublicImages:
    """Return the public images beside a data set that clients train on.

    An image that equals a training image byte for byte is left out, whichever data set it comes from: what any
    client might hold is not public.

    Args:
        source: Where from; see `load_public` for what becomes of another data set's images.
        dataset: The clients' data set.
        data_dir: See `load_dataset`.

    Raises:
        ConfigError: If a named data set cannot be loaded, has images of another shape or more classes, or if
            nothing is left.
    """
    if source == "test":
        images, labels = dataset.test_images, dataset.test_labels
    else:
        images, labels = load_public(source, dataset.shape, dataset.classes, data_dir)
    held = {image.tobytes() for image in dataset.train_images}
    free = np.array([image.tobytes() not in held for image in images], dtype=bool)
    if not free.any():
        raise ConfigError(f"public: {source}: clients hold all of these images, so that none is public")
    return PublicImages.of(images[free], labels[free])


def load_public(
    source: PublicSource,
    shape: tuple[int, int, int],
    classes: int,
    data_dir: Path | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load all images [P, C, H, W] and labels [P] of a data set for a model of `shape` and `classes`.

    They are brought to 1×28×28 or 3×32×32, as the settings of data sets offer, where the model takes that.

    Raises:
        ConfigError: If it cannot be loaded or does not fit the model.
    """
    wanted = "x".join(map(str, shape))
    found = load_dataset(_CONFIGS[source](shape=wanted if wanted in SHAPES else "native"), data_dir)
    if found.shape != shape:
        raise ConfigError(f"public: {source} has images of {list(found.shape)}, the model takes {list(shape)}")
    if found.classes > classes:
        raise ConfigError(f"public: {source} has {found.classes} classes, the model {classes}")
    images = np.concatenate([found.test_images, found.train_images])
    return images, np.concatenate([found.test_labels, found.train_labels])
