from dataclasses import replace

import numpy as np
import pytest

from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.data.public import load_public, public_images
from fedsim.errors import ConfigError


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


def test_test_images_are_public_but_for_those_that_clients_also_hold(digits: Dataset) -> None:
    leaked = np.concatenate([digits.test_images, digits.train_images[:5]])
    labels = np.concatenate([digits.test_labels, digits.train_labels[:5]])
    public = public_images("test", replace(digits, test_images=leaked, test_labels=labels))
    held = {image.tobytes() for image in digits.train_images}
    expected = [image.tobytes() not in held for image in digits.test_images]
    assert np.array_equal(public.images, digits.test_images[expected])
    assert np.array_equal(public.labels, digits.test_labels[expected])


def test_of_the_clients_own_data_set_only_what_they_do_not_hold_is_public(digits: Dataset) -> None:
    named, own = public_images("digits", digits), public_images("test", digits)
    assert named.fingerprint == own.fingerprint
    nothing = replace(digits, test_images=digits.train_images, test_labels=digits.train_labels)
    with pytest.raises(ConfigError, match="^public: test: clients hold all of these images"):
        public_images("test", nothing)


def test_other_shapes_and_more_classes_are_refused_and_known_shapes_are_made() -> None:
    assert load_public("digits", (3, 32, 32), 10)[0].shape == (1797, 3, 32, 32)
    with pytest.raises(
        ConfigError, match=r"^public: digits has images of \[1, 28, 28\], the model takes \[1, 8, 8\]"
    ):
        load_public("digits", (1, 8, 8), 10)
    with pytest.raises(ConfigError, match="^public: digits has 10 classes, the model 4$"):
        load_public("digits", (1, 28, 28), 4)
