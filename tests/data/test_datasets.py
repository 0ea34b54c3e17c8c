import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from sklearn.datasets import load_digits

from fedsim.data.datasets import (
    CIFAR10Config,
    CustomDatasetConfig,
    Dataset,
    DatasetConfig,
    DigitsConfig,
    FashionMNISTConfig,
    MNISTConfig,
    _read_digits,
    load_dataset,
    mean_image,
    root_set,
)
from fedsim.errors import ConfigError

ARRAYS = (
    np.arange(12 * 2 * 16, dtype=np.uint8).reshape(12, 2, 4, 4),
    np.arange(12) % 3,
    np.ones((3, 2, 4, 4), np.uint8),
    np.array([0, 1, 2], np.int32),
)


def factory(**replaced):
    return tuple(replaced.get(str(number), part) for number, part in enumerate(ARRAYS))


def nothing():
    return None


def custom(**replaced) -> CustomDatasetConfig:
    return CustomDatasetConfig(factory=f"{__name__}:factory", options=replaced)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


def test_digits_need_no_files(digits):
    assert digits.train_images.shape == (1437, 1, 28, 28) and digits.test_images.shape == (360, 1, 28, 28)
    assert digits.shape == (1, 28, 28) and digits.classes == 10
    assert digits.train_images.min() == 0 and digits.train_images.max() == 255


def test_digits_are_read_as_scikit_learn_reads_them():
    assert all(np.array_equal(a, b) for a, b in zip(_read_digits(), load_digits(return_X_y=True), strict=True))


def test_digits_are_split_by_class_and_lose_none(digits):
    totals = np.bincount(load_digits().target)
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert (train + test == totals).all()
    assert abs(test - totals / 5).max() <= 1
    both = np.concatenate([digits.train_images, digits.test_images])
    assert len(np.unique(both.reshape(len(both), -1), axis=0)) == 1797


def test_digits_are_the_originals_enlarged_as_by_pillow(digits):
    source = load_digits()
    levels = np.rint(source.images * 255 / 16).astype(np.uint8)
    large = [Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in levels]
    by_label = {label: np.array(large, np.int16)[source.target == label] for label in range(10)}
    for image, label in zip(digits.test_images[:, 0], digits.test_labels, strict=True):
        distances = abs(by_label[int(label)] - image).max(axis=(1, 2))
        assert distances.min() <= 2


def test_digits_are_the_same_on_every_machine(digits):
    assert digits.fingerprint.startswith("9687b22b010a")


@pytest.mark.parametrize(
    ("config", "shape", "name"),
    [
        (MNISTConfig(), (1, 28, 28), "9"),
        (FashionMNISTConfig(shape="3x32x32"), (3, 32, 32), "ankle boot"),
        (CIFAR10Config(), (3, 32, 32), "truck"),
        (CIFAR10Config(shape="1x28x28"), (1, 28, 28), "truck"),
    ],
)
def test_file_sets_become_data_sets(tiny, config, shape, name):
    dataset = load_dataset(config, tiny)
    assert (dataset.name, dataset.shape, dataset.class_names[9]) == (config.name, shape, name)
    assert dataset.test_images.shape == (10, *shape) and dataset.classes == 10


def test_arrays_are_contiguous_and_read_only(tiny):
    for config in (MNISTConfig(), CIFAR10Config(shape="1x28x28"), DigitsConfig(), custom()):
        dataset = load_dataset(config, tiny)
        for part in (dataset.train_images, dataset.test_images, dataset.train_labels, dataset.test_labels):
            assert part.flags.c_contiguous and not part.flags.writeable
        assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.dtype == np.int64
    assert ARRAYS[0].flags.writeable


def test_a_data_set_can_be_sent(digits):
    copy = pickle.loads(pickle.dumps(digits, protocol=5))
    assert copy.fingerprint == digits.fingerprint
    assert np.array_equal(copy.train_images, digits.train_images)


def test_the_fingerprint_depends_on_every_part():
    changed = [ARRAYS[0].copy(), ARRAYS[1].copy(), ARRAYS[2].copy(), ARRAYS[3].copy()]
    prints = {load_dataset(custom()).fingerprint}
    for number, part in enumerate(changed):
        part.flat[0] += 1
        prints.add(load_dataset(custom(**{str(number): part})).fingerprint)
    transposed = ARRAYS[0].reshape(12, 2, 2, 8), ARRAYS[2].reshape(3, 2, 2, 8)
    prints.add(load_dataset(custom(**{"0": transposed[0], "2": transposed[1]})).fingerprint)
    assert len(prints) == 6
    assert load_dataset(custom()).fingerprint in prints


def test_a_custom_data_set():
    dataset = load_dataset(custom())
    assert dataset.shape == (2, 4, 4) and dataset.class_names == ("0", "1", "2")
    grey = load_dataset(custom(**{"0": ARRAYS[0][:, 0], "2": ARRAYS[2][:, 0]}))
    assert grey.shape == (1, 4, 4)
    named = CustomDatasetConfig(factory=f"{__name__}:factory", class_names=("a", "b", "c", "d"))
    assert load_dataset(named).classes == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (custom(**{"0": ARRAYS[0] / 255}), "images of type float64.*must be uint8"),
        (custom(**{"0": ARRAYS[0][0, 0]}), r"images of type uint8 \[4, 4\]"),
        (custom(**{"1": ARRAYS[1] - 1}), "labels .*integers from 0"),
        (custom(**{"1": ARRAYS[1] / 2}), "labels of type float64"),
        (custom(**{"1": ARRAYS[1][1:]}), "not one label an image"),
        (custom(**{"2": ARRAYS[2][:0], "3": ARRAYS[3][:0]}), "none at all"),
        (custom(**{"2": ARRAYS[2][:, :1]}), "images of two shapes"),
        (CustomDatasetConfig(factory=f"{__name__}:nothing"), "must return four arrays"),
        (CustomDatasetConfig(factory=f"{__name__}:absent"), "no attribute 'absent'"),
        (
            CustomDatasetConfig(factory=f"{__name__}:factory", class_names=("a",)),
            r"data\.class_names: 1 names for 3 classes",
        ),
    ],
)
def test_a_bad_custom_data_set_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset(config)


def test_settings_are_a_union_on_the_name():
    read = TypeAdapter(DatasetConfig).validate_python
    config = read({"name": "mnist", "partition": {"name": "dirichlet", "alpha": 0.3}, "shape": "3x32x32"})
    assert isinstance(config, MNISTConfig) and config.partition.name == "dirichlet"
    assert read({"name": "digits"}).partition.name == "iid"
    for wrong in ({"name": "imagenet"}, {"name": "mnist", "shape": "1x32x32"}, {"name": "custom"}):
        with pytest.raises(ValidationError):
            read(wrong)


@pytest.mark.parametrize("per_class", [0, 1, 5])
def test_the_root_set_is_balanced_and_kept_from_the_clients(digits, per_class):
    root, rest = root_set(digits, per_class, seed=3)
    assert np.array_equal(np.sort(np.concatenate([root, rest])), np.arange(1437))
    assert (np.bincount(digits.train_labels[root], minlength=10) == per_class).all()
    assert (np.diff(rest) > 0).all()


def test_the_root_set_is_drawn_from_the_seed(digits):
    assert np.array_equal(root_set(digits, 5, 0)[0], root_set(digits, 5, 0)[0])
    assert not np.array_equal(root_set(digits, 5, 0)[0], root_set(digits, 5, 1)[0])


def test_a_root_set_that_leaves_a_class_empty_is_refused(digits):
    with pytest.raises(ConfigError, match="a root set of 139 images a class, but '8' has 139"):
        root_set(digits, 139, 0)


def test_mean_image(digits):
    mean = mean_image(digits)
    assert mean.dtype == np.float32 and mean.shape == (1, 28, 28)
    assert np.allclose(mean, np.mean([image / 255 for image in digits.train_images], axis=0), atol=1e-7)


def test_loading_data_imports_neither_torchvision_nor_a_runtime():
    code = (
        "import sys; from fedsim.data.datasets import DigitsConfig, load_dataset; load_dataset(DigitsConfig()); "
        "print([m for m in ('torchvision', 'sklearn', 'ray', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("config", "mean"), [(MNISTConfig(), 0.1307), (FashionMNISTConfig(), 0.2860), (CIFAR10Config(), 0.4734)]
)
def test_real_data_have_the_known_mean(real_data, config, mean):
    dataset = load_dataset(config, real_data, download=False)
    assert mean_image(dataset).mean() == pytest.approx(mean, abs=1e-4)
    assert len(dataset.test_images) == 10_000
    assert dataset.train_images.shape[0] == (50_000 if config.name == "cifar10" else 60_000)
