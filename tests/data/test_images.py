import numpy as np
import pytest
from PIL import Image

from fedsim.data.images import reshape_images, scale_images
from fedsim.errors import ConfigError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 1, 28, 28), np.uint8)
RGB = RNG.integers(0, 256, (8, 3, 32, 32), np.uint8)


def by_pillow(image: np.ndarray, size: int, mode: str) -> np.ndarray:
    """An image [H, W] or [H, W, 3] converted and scaled by Pillow, as [C, size, size]."""
    made = Image.fromarray(image).convert(mode).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(made).reshape(size, size, -1).transpose(2, 0, 1)


def test_grey_becomes_rgb_as_in_graddefense():
    expected = np.stack([by_pillow(image[0], 32, "RGB") for image in GREY])
    ours = reshape_images(GREY, (3, 32, 32))
    assert ours.dtype == np.uint8 and np.array_equal(ours, expected)


@pytest.mark.parametrize(("size", "levels"), [(32, 0), (28, 1)])
def test_rgb_becomes_grey_as_in_pillow(size, levels):
    expected = np.stack([by_pillow(image.transpose(1, 2, 0), size, "L") for image in RGB])
    ours = reshape_images(RGB, (1, size, size))
    assert ours.shape == expected.shape
    assert abs(ours.astype(int) - expected).max() <= levels


def test_the_same_shape_costs_nothing():
    assert reshape_images(GREY, (1, 28, 28)) is GREY


def test_read_only_images_are_scaled():
    frozen = GREY.copy()
    frozen.flags.writeable = False
    assert np.array_equal(scale_images(frozen, (8, 8), "bicubic"), scale_images(GREY, (8, 8), "bicubic"))


def test_a_constant_image_stays_constant():
    assert (scale_images(np.full((1, 1, 8, 8), 77, np.uint8), (28, 28), "bicubic") == 77).all()


def test_other_channels_are_refused():
    with pytest.raises(ConfigError, match="cannot turn 2 channels into 3"):
        reshape_images(np.zeros((1, 2, 8, 8), np.uint8), (3, 32, 32))
