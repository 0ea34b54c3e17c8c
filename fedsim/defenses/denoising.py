"""Drop from an aggregate the spectral components that noise alone would produce."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.errors import ConfigError


def marchenko_pastur_denoise(aggregate: Tensor, noise_std: float, aspect: float = 6.0) -> Tensor:
    """Drop the spectral components of `aggregate` that noise alone would produce.

    The vector is folded row by row into a matrix C of about `aspect` times as many rows v as columns w, padded
    with zeros. Of the eigenvectors of its second moment CᵀC/v, those with an eigenvalue inside the
    Marchenko–Pastur bulk noise_std²·(1 ± √(w/v))² are projected out of C. Nothing is centred, neither moment
    nor projection: the noise has mean zero, and a mean is a component like any other.

    Args:
        aggregate: Weighted mean of the protected updates, shape [d].
        noise_std: Standard deviation of the noise left in one entry of `aggregate`, in gradient units.
        aspect: Wanted ratio v/w, at least 1.

    Returns:
        The denoised vector, shape [d], same dtype and device.

    Raises:
        ValueError: If `noise_std` is negative or `aggregate` is not a vector.

    Source:
        Wang et al., "Protect Privacy from Gradient Leakage Attack in Federated Learning", INFOCOM 2022;
        Marchenko and Pastur, 1967.
    """
    _check(aggregate, noise_std)
    dimension = aggregate.numel()
    columns = max(1, round(math.sqrt(dimension / aspect)))
    rows = -(-dimension // columns)
    matrix = F.pad(aggregate.double(), (0, rows * columns - dimension)).view(rows, columns)
    moment = matrix.T @ matrix / (dimension / columns)
    denoised = _without_bulk(matrix, moment, noise_std, ratio=dimension / columns**2)
    return denoised.flatten()[:dimension].to(aggregate.dtype)


def published_denoise(aggregate: Tensor, noise_std: float, aspect: float = 6.0) -> Tensor:
    """Denoise with the published code's arithmetic (trap 5): as above, but for three things.

    The matrix has no padding but the shape of `published_shape`, the covariance is centred (ddof 1), and the
    projection is not.

    Args:
        aggregate: Mean of the protected updates, shape [d].
        noise_std: What the published code calls scale, in gradient units.
        aspect: Wanted ratio of rows to columns.

    Returns:
        The denoised vector, shape [d], same dtype and device.

    Raises:
        ValueError: If `noise_std` is negative or `aggregate` is not a vector.
        ConfigError: If d has no divisor that gives a matrix of two columns or more.

    Source:
        The published code, `compensate.py`. It decomposes the covariance by a general `eig`; the projector onto
        the kept eigenvectors is the same by `eigh` wherever `eig` returns orthogonal ones, which it need not
        do for a repeated eigenvalue.
    """
    _check(aggregate, noise_std)
    rows, columns = published_shape(aggregate.numel(), aspect)
    matrix = aggregate.double().view(rows, columns)
    covariance = torch.cov(matrix.T)
    return _without_bulk(matrix, covariance, noise_std, rows / columns).flatten().to(aggregate.dtype)


def published_shape(dimension: int, aspect: float) -> tuple[int, int]:
    """Return rows and columns of the published code's matrix: rows is the least divisor ≥ √(aspect·d).

    Raises:
        ConfigError: If no such divisor leaves two columns, where the published code fails (a prime d).
    """
    wanted = math.sqrt(aspect * dimension)
    small = [i for i in range(1, math.isqrt(dimension) + 1) if dimension % i == 0]
    rows = min((i for i in {*small, *(dimension // i for i in small)} if i >= wanted), default=dimension)
    if rows == dimension:
        raise ConfigError(
            f"defense.variant: published cannot fold {dimension} parameters into a matrix of aspect {aspect:g}"
        )
    return rows, dimension // rows


def _check(aggregate: Tensor, noise_std: float) -> None:
    if aggregate.dim() != 1:
        raise ValueError(f"the aggregate must be a vector, not of shape {tuple(aggregate.shape)}")
    if noise_std < 0:
        raise ValueError(f"noise_std must not be negative, got {noise_std}")


def _without_bulk(matrix: Tensor, moment: Tensor, noise_std: float, ratio: float) -> Tensor:
    """Project `matrix` [v, w] onto the eigenvectors of `moment` [w, w] outside the bulk of aspect `ratio`."""
    if not torch.isfinite(moment).all():
        return matrix  # training has diverged: let the weights show it
    low, high = ((noise_std * (1 + sign / math.sqrt(ratio))) ** 2 for sign in (-1, 1))
    values, vectors = torch.linalg.eigh(moment)
    kept = (values <= low) | (values >= high)
    projector: Tensor = (vectors * kept) @ vectors.T
    return matrix @ projector
