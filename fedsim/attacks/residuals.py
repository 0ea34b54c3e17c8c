"""What a generator cannot draw of an image: how much of it is to be expected, frequency by frequency."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LEAST_VARIANCE = 1e-6
"""Variance that any frequency is granted, in pixel units: about what rounding to bytes leaves."""


@dataclass(frozen=True)
class Residuals:
    """Differences between images and the generator's nearest: Gaussian, each frequency by itself.

    Attributes:
        variances: Variance of each coefficient of the two-dimensional cosine transform, shape [H, W], the same for
            all channels.
    """

    variances: Tensor

    @classmethod
    def of(cls, differences: Tensor) -> "Residuals":
        """Measure the variances on differences [n, C, H, W].

        One image more, white and as strong as the others' mean, keeps what few images show from being taken for
        certain.
        """
        squares = transform(differences).square().flatten(0, 1)
        variances = (squares.sum(0) + squares.mean()) / (len(squares) + 1)
        return cls(variances.clamp_min(LEAST_VARIANCE))

    def penalty(self, differences: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ c²/variance over the coefficients c of differences [m, B, C, H, W], [m], and half its slope.

        For differences like those measured it is about the number of pixels.
        """
        coefficients = transform(differences)
        weighted = coefficients / self.variances.to(differences)
        return (coefficients * weighted).flatten(1).sum(1), inverse(weighted)


def transform(images: Tensor) -> Tensor:
    """Return the coefficients [..., H, W] of the orthonormal cosine transform (DCT-II) of images [..., H, W].

    Source: Ahmed, Natarajan and Rao, "Discrete Cosine Transform", IEEE Trans. Computers C-23(1), 1974.
    """
    down, across = (_cosines(side).to(images) for side in images.shape[-2:])
    return down @ images @ across.T


def inverse(coefficients: Tensor) -> Tensor:
    """Return the images [..., H, W] of coefficients."""
    down, across = (_cosines(side).to(coefficients) for side in coefficients.shape[-2:])
    return down.T @ coefficients @ across


@cache
def _cosines(side: int) -> Tensor:
    """Return the orthogonal matrix [side, side] whose rows are the cosines."""
    rows, columns = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    matrix = (math.pi / side * rows * (columns + 0.5)).cos() * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix
