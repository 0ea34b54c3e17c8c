"""Images as uint8 [N, C, H, W] made into another shape, as Pillow would."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from fedsim.errors import ConfigError

LUMA = (19595, 38470, 7471)
"""ITU-R 601 weights of red, green and blue in 1/65536, as Pillow has them."""


def reshape_images(images: NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Give images another shape: grey or RGB by luma or copies, then bilinear scaling with antialiasing.

    A grey image made into 3×32×32 is what `Resize(32)` and `Grayscale(3)` yield in GradDefense's code.

    Args:
        images: uint8 [N, C, H, W].
        shape: Wanted (C, H, W).

    Returns:
        uint8 [N, *shape]; `images` itself if it has that shape already.

    Raises:
        ConfigError: If the number of channels would change and is neither 1 nor 3.
    """
    if images.shape[1] != shape[0]:
        images = _recolour(images, shape[0])
    return images if images.shape[2:] == shape[1:] else scale_images(images, shape[1:], "bilinear")


def scale_images(images: NDArray[np.uint8], size: tuple[int, int], mode: str) -> NDArray[np.uint8]:
    """Scale uint8 [N, C, H, W] to `size` (H, W) by `bilinear` or `bicubic` interpolation, antialiased.

    PyTorch computes this in integers for uint8, so that the result is the same on every processor; it
    differs from Pillow's by at most two grey levels, in few pixels.
    """
    # A copy, since PyTorch objects to memory that it may not write.
    source = torch.from_numpy(images if images.flags.writeable else images.copy())
    return F.interpolate(source, size=size, mode=mode, antialias=True).contiguous().numpy()


def _recolour(images: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    if {images.shape[1], channels} != {1, 3}:
        raise ConfigError(f"data.shape: cannot turn {images.shape[1]} channels into {channels}")
    if channels == 3:
        return np.repeat(images, 3, axis=1)
    grey = np.full(images[:, 0].shape, 1 << 15, np.uint32)
    for channel, weight in enumerate(LUMA):
        grey += images[:, channel] * np.uint32(weight)
    return (grey >> 16).astype(np.uint8)[:, None]
