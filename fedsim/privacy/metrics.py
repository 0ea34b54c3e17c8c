"""How close a reconstruction is to the private images, and how close knowing nothing comes.

SciPy and scikit-image are imported where they are used: a run's first round need not wait for them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.randomness import Purpose, torch_stream

PSNR_CAP = 100.0
"""PSNR, in dB, that stands for a perfect reconstruction, whose PSNR is infinite."""

SSIM_WINDOW = 7
"""Side of the SSIM window in pixels; an image smaller than that gets the largest odd side that fits."""


@dataclass(frozen=True)
class ImageScore:
    """The score of one private image.

    Attributes:
        victim: Index of the victim, 0 … N−1.
        image: Index of the image in the victim's batch, 0 … B−1.
        PSNR: Peak signal-to-noise ratio in dB, at most `PSNR_CAP`.
        SSIM: Structural similarity, −1 … 1.
        capped: Whether the true PSNR exceeds `PSNR_CAP`.
        matched: Index in the batch of the reconstruction that this image was matched with.
    """

    victim: int
    image: int
    PSNR: float
    SSIM: float
    capped: bool
    matched: int


def score(originals: Tensor, reconstructions: Tensor) -> list[ImageScore]:
    """Score reconstructions against the private images, whose order in a batch no attack can know.

    Reconstructions are first clamped to [0, 1] (a pixel that is not a number becomes mid-grey); each batch is
    then assigned to its originals so that the total squared error is least.

    Args:
        originals: Private images, shape [N, B, C, H, W], values in [0, 1].
        reconstructions: What the attack returned, same shape.

    Returns:
        One score an image, victim by victim, images in the order of `originals`.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Wang et al., IEEE Trans. Image Processing 13(4), 2004 (SSIM); Kuhn, 1955 (assignment).
    """
    if originals.shape != reconstructions.shape or originals.ndim != 5:
        shapes = f"{tuple(originals.shape)} and {tuple(reconstructions.shape)}"
        raise ValueError(f"originals and reconstructions must share a shape [N, B, C, H, W]; got {shapes}")
    truth = _pixels(originals)
    guess = _pixels(reconstructions)
    return [row for victim in range(len(truth)) for row in _batch(victim, truth[victim], guess[victim])]


def floors(originals: Tensor, mean_image: Tensor, seed: int) -> dict[str, list[ImageScore]]:
    """Score guesses that know nothing of the victims; no attack below their best has shown anything.

    Args:
        originals: Private images, shape [N, B, C, H, W], values in [0, 1].
        mean_image: Mean of the data set's training images, shape [C, H, W].
        seed: Seed of the two random guesses.

    Returns:
        Scores of `noise` (N(0, 1), clamped), `uniform` (U[0, 1)), `mean` (`mean_image`) and `grey` (0.5).
    """
    generator = torch_stream(seed, Purpose.ATTACK)
    blank = torch.empty(originals.shape)
    guesses = {
        "noise": blank.normal_(generator=generator).clone(),
        "uniform": blank.uniform_(generator=generator).clone(),
        "mean": mean_image.cpu().expand(originals.shape),
        "grey": torch.full(originals.shape, 0.5),
    }
    return {name: score(originals, guess) for name, guess in guesses.items()}


def _pixels(images: Tensor) -> np.ndarray:
    finite = torch.nan_to_num(images.detach().cpu().double(), nan=0.5)
    return np.asarray(finite.clamp(0, 1).numpy())


def _batch(victim: int, truth: np.ndarray, guess: np.ndarray) -> list[ImageScore]:
    from scipy.optimize import linear_sum_assignment

    flat_truth, flat_guess = truth.reshape(len(truth), -1), guess.reshape(len(guess), -1)
    cost = ((flat_truth[:, None] - flat_guess[None]) ** 2).mean(-1)
    matches = linear_sum_assignment(cost)[1]
    return [_row(victim, i, int(j), truth[i], guess[j]) for i, j in enumerate(matches)]


def _row(victim: int, image: int, matched: int, truth: np.ndarray, guess: np.ndarray) -> ImageScore:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    with np.errstate(divide="ignore"):
        psnr = float(peak_signal_noise_ratio(truth, guess, data_range=1))
    side = min(SSIM_WINDOW, *truth.shape[1:])
    ssim = structural_similarity(truth, guess, data_range=1, channel_axis=0, win_size=side - 1 + side % 2)
    return ImageScore(victim, image, min(psnr, PSNR_CAP), float(ssim), psnr > PSNR_CAP, matched)
