"""GradDefense: noise on random slices of equal leakage risk, and a server that filters it out again."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedsim.defenses.base import (
    ClientContext,
    Defense,
    DefenseSettings,
    Public,
    PublicContext,
    ServerContext,
)
from fedsim.defenses.clipping import clip_slices_
from fedsim.defenses.denoising import marchenko_pastur_denoise, published_denoise, published_shape
from fedsim.defenses.sensitivity import frobenius_risk, published_risk
from fedsim.defenses.slicing import equal_risk_bounds, joined_slices, published_bounds
from fedsim.errors import RunError


class GradDefenseConfig(DefenseSettings):
    """Noise on k of n slices of equal leakage risk, compensated on the server."""

    name: Literal["graddefense"] = "graddefense"
    variant: Literal["corrected", "published"] = "corrected"
    """`corrected`: the method; `published`: the arithmetic of the published code, its mistakes included."""
    slices: int = Field(default=10, ge=1)
    """Number n of slices of equal risk."""
    perturbed: int = Field(default=5, ge=1)
    """Number k of slices that a client perturbs in a round, at most n."""
    sigma: float = Field(default=5e-4, ge=0)
    """Standard deviation of the Gaussian noise on one entry of a perturbed slice, in gradient units."""
    clipping_norm: float | None = Field(default=None, gt=0)
    """L2 norm to which each sample's perturbed slices are clipped first, in gradient units (one local step);
    null: no clipping. The published code uses sigma."""
    aspect: float = Field(default=6.0, ge=1)
    """Wanted ratio Q of rows to columns of the matrix that the server denoises."""
    compensation: Literal["marchenko_pastur", "none"] = "marchenko_pastur"
    """How the server filters the aggregate."""
    error_feedback: bool | None = None
    """Whether what compensation removed is added to the next aggregate; null: in `corrected` only."""
    sensitivity_probes: int | None = Field(default=2, ge=1)
    """Random directions that estimate the risk at a root image (with batch norm: at a batch of root images,
    in all); null: the exact risk, at the cost of one direction for each pixel. `corrected` only."""
    refresh_rounds: int | None = Field(default=None, ge=1)
    """The risk is estimated again every so many rounds; null: before the first only."""

    @model_validator(mode="after")
    def _slices_suffice(self) -> Self:
        if self.perturbed > self.slices:
            raise ValueError(f"perturbed ({self.perturbed}) must not exceed slices ({self.slices})")
        return self

    @property
    def feeds_back(self) -> bool:
        """Whether the server keeps what compensation removed."""
        return self.variant == "corrected" if self.error_feedback is None else self.error_feedback

    def build(self) -> "GradDefense":
        """Return the defense."""
        return GradDefense(self)

    def needs_one_local_step(self) -> bool:
        """Per-sample gradients describe one local step."""
        return self.clipping_norm is not None

    def strategies(self) -> tuple[str, ...]:
        """Bounds, number and strength of the noisy slices are public; which they are is not."""
        return ("slices", "denoise", "average", "agreement")

    def oracle_strategies(self) -> tuple[str, ...]:
        """An oracle knows the slices that a client has drawn."""
        return ("told_slices",)


class GradDefense(Defense):
    """The defense of the paper, its five parts in order: risk, slices, perturbation, clipping, compensation.

    It publishes `slice_bounds` [n + 1] (slice i is entries [bounds[i], bounds[i + 1])) and `risk` [L], one
    number a parameter.

    Source:
        Wang et al., "Protect Privacy from Gradient Leakage Attack in Federated Learning", INFOCOM 2022. Error
        feedback is not theirs; it follows Seide et al., "1-Bit Stochastic Gradient Descent", 2014.
    """

    def __init__(self, settings: GradDefenseConfig) -> None:
        """Take the settings."""
        self.settings = settings
        self.published = settings.variant == "published"
        self.refresh_rounds = settings.refresh_rounds
        self._removed: Tensor | None = None

    def prepare(self, context: PublicContext) -> Public:
        """Return the risk of each parameter and the bounds of the slices.

        Raises:
            ConfigError: If the model has too few parameters, or the published variant cannot fold them.
            RunError: If the risk is not finite.
        """
        layout, settings = context.model.layout, self.settings
        if self.published and settings.compensation != "none":
            published_shape(layout.dimension, settings.aspect)
        risk = published_risk(context) if self.published else frobenius_risk(context, settings.sensitivity_probes)
        if not torch.isfinite(risk).all():
            raise RunError("the leakage risk is not finite: training has diverged")
        cut = published_bounds if self.published else equal_risk_bounds
        bounds = cut(risk.double().cpu().numpy(), layout.sizes, settings.slices)
        return {"slice_bounds": torch.from_numpy(bounds), "risk": risk}

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        """Add noise to k random slices of each row of `updates` [K, d], clipped before if so set."""
        bounds = context.public["slice_bounds"].tolist()
        selected = self._select(context)
        protected = self._clipped(updates, selected, bounds, context)
        for row, chosen, generator in zip(protected, selected.tolist(), context.generators, strict=True):
            stretches = joined_slices(bounds, chosen)
            # One draw for all of them: noise costs nearly all of what this defense does.
            noise = row.new_empty(sum(stop - start for start, stop in stretches)).normal_(generator=generator)
            used = 0
            for start, stop in stretches:
                row[start:stop].add_(noise[used : used + stop - start], alpha=self.settings.sigma)
                used += stop - start
        if self.published:
            self._perturb_neighbours(protected, selected, bounds, context)
        return protected

    def secrets(self, context: ClientContext) -> dict[str, Tensor]:
        """Return which slices each client draws, `selected` [K, n], bool."""
        return {"selected": self._select(context)}

    def _select(self, context: ClientContext) -> Tensor:
        """Draw k of the n slices for each client, as a mask [K, n]."""
        draws = context.uniform(self.settings.slices)
        chosen = draws.topk(self.settings.perturbed, dim=1).indices
        return torch.zeros_like(draws, dtype=torch.bool).scatter_(1, chosen, True)

    def _clipped(self, updates: Tensor, selected: Tensor, bounds: list[int], context: ClientContext) -> Tensor:
        """Return a copy of `updates`, or the mean of the clipped per-sample gradients in its place."""
        norm = self.settings.clipping_norm
        if norm is None:
            return updates.clone()
        slices = [slice(start, stop) for start, stop in pairwise(bounds)]
        if self.published:
            slices[1:] = [slice(part.start - 1, part.stop) for part in slices[1:]]
        means = torch.empty_like(updates)
        for rows, gradients in context.per_sample_gradients():
            means[rows] = clip_slices_(gradients, slices, selected[rows], norm).mean(1)
        return means

    def _perturb_neighbours(
        self, protected: Tensor, selected: Tensor, bounds: list[int], context: ClientContext
    ) -> None:
        """Add the noise that each published slice but the first puts on the entry before it (trap 2)."""
        dimension = protected.shape[1]
        starts = torch.tensor(bounds[1:-1], dtype=torch.long, device=protected.device)
        noise = context.normal(len(starts)) * selected[:, 1:]
        protected.index_add_(1, (starts - 1) % dimension, noise, alpha=self.settings.sigma)

    def compensate(self, aggregate: Tensor, context: ServerContext) -> Tensor:
        """Denoise `aggregate` [d]; what is removed waits for the next round if error feedback is on."""
        if self.settings.compensation == "none":
            return aggregate
        if self._removed is not None:
            aggregate = aggregate + self._removed
        denoise = published_denoise if self.published else marchenko_pastur_denoise
        denoised = denoise(aggregate, self.noise_std(context.client_weights), self.settings.aspect)
        if self.settings.feeds_back:
            self._removed = aggregate - denoised
        return denoised

    def noise_std(self, client_weights: Tensor) -> float:
        """Return the standard deviation that compensation assumes of the noise in the aggregate.

        The noise left by clients of weights w is of variance (k/n)·σ²·Σw². The published demo takes
        (k/n)·σ²·(number of clients)·Σw for it (trap 4).
        """
        settings = self.settings
        variance = settings.perturbed / settings.slices * settings.sigma**2
        if self.published:
            return math.sqrt(variance * len(client_weights) * float(client_weights.sum()))
        return math.sqrt(variance * float(client_weights.double().square().sum()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what compensation removed in the last round, if there is something: `removed` [d]."""
        return {} if self._removed is None else {"removed": self._removed}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._removed = state.get("removed")
