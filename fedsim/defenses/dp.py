"""Noise on every entry of an update: the Gaussian and the Laplacian mechanism."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedsim.defenses.base import ClientContext, Defense, DefenseSettings
from fedsim.defenses.clipping import clipped


class NoiseConfig(DefenseSettings):
    """What both mechanisms share."""

    sigma: float = Field(default=0.1, ge=0)
    """Standard deviation of the noise on one entry of a client's update, in gradient units."""
    clipping_norm: float | None = Field(default=None, gt=0)
    """L2 norm that is clipped to before the noise, in gradient units; null: no clipping."""
    clip: Literal["client", "sample"] = "client"
    """What is clipped: the update, or each sample's gradient before they are averaged (one local step)."""

    @model_validator(mode="after")
    def _norm_for_samples(self) -> Self:
        if self.clip == "sample" and self.clipping_norm is None:
            raise ValueError("clip: sample needs a clipping_norm")
        return self

    def needs_one_local_step(self) -> bool:
        """Per-sample gradients describe one local step."""
        return self.clip == "sample"

    def strategies(self) -> tuple[str, ...]:
        """The noise is the only secret, and to be told it would be to be told the gradient: no oracle."""
        clipping = () if self.clipping_norm is None else ("clipped",)
        return ("likelihood", "denoise", "average", *clipping)


class GaussianConfig(NoiseConfig):
    """Gaussian noise on every entry of the update, after optional clipping."""

    name: Literal["dp_gaussian"] = "dp_gaussian"

    def build(self) -> "AdditiveNoise":
        """Return the defense."""
        return AdditiveNoise(self, laplacian=False)


class LaplacianConfig(NoiseConfig):
    """Laplacian noise of scale sigma/√2 on every entry of the update, after optional clipping."""

    name: Literal["dp_laplacian"] = "dp_laplacian"

    def build(self) -> "AdditiveNoise":
        """Return the defense."""
        return AdditiveNoise(self, laplacian=True)

    def strategies(self) -> tuple[str, ...]:
        """Beside those against any noise, the distance that fits its distribution."""
        return (*super().strategies(), "laplace")


class AdditiveNoise(Defense):
    """Clips, then adds independent noise to every entry.

    By itself this promises nothing: a privacy budget follows from the ratio of sigma to clipping_norm, the
    batch size when samples are clipped, and the number of rounds.

    Source: Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014, definition 3.3 and
    theorem 3.22; Abadi et al., "Deep Learning with Differential Privacy", CCS 2016 (clip "sample"); McMahan
    et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018 (clip "client").
    """

    def __init__(self, settings: NoiseConfig, laplacian: bool) -> None:
        """Take the settings and the shape of the noise."""
        self.settings = settings
        self.laplacian = laplacian

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        """Return clipped `updates` [K, d] plus noise of standard deviation sigma."""
        updates = self._clip(updates, context)
        dimension = updates.shape[1]
        if self.laplacian:
            noise = laplace_(context.uniform(dimension))
            return torch.add(updates, noise, alpha=self.settings.sigma / math.sqrt(2))
        return torch.add(updates, context.normal(dimension), alpha=self.settings.sigma)

    def _clip(self, updates: Tensor, context: ClientContext) -> Tensor:
        norm = self.settings.clipping_norm
        if norm is None:
            return updates
        if self.settings.clip == "client":
            return clipped(updates, norm)
        means = torch.empty_like(updates)
        for rows, gradients in context.per_sample_gradients():
            means[rows] = clipped(gradients, norm).mean(1)
        return means


def laplace_(uniform: Tensor) -> Tensor:
    """Turn U[0, 1) draws into Laplace draws of scale 1 (standard deviation √2), overwriting them.

    Source: inverse of the Laplace distribution function.
    """
    # Uniform draws are multiples of eps/2 from 0: half a step further they are symmetric about 1/2 and never
    # reach 0 or 1, where the logarithm is infinite. All up to the logarithm is exact on a CPU, so that log
    # loses nothing to log1p, which takes four times as long.
    centred = uniform.sub_(0.5 - torch.finfo(uniform.dtype).eps / 4)
    return centred.abs().mul_(-2).add_(1).log_().copysign_(centred)
