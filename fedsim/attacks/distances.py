"""Distances between gradients: how far those of dummy batches are from what the victims sent."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """What the N victims sent, without the ignored parameters.

    Attributes:
        vectors: Gradients, shape [N, e].
        sizes: Number of entries of each parameter in them, in layout order; they sum to e.
        spans: Where each of these parameters lies in a whole gradient of d entries; None: nothing is ignored.
    """

    vectors: Tensor
    sizes: tuple[int, ...]
    spans: tuple[slice, ...] | None = None


class Distance(Protocol):
    """How far gradients are from what victims sent; made from `Targets`."""

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """Compare gradients [m, e] with those of `victims` [m].

        Returns:
            Distances [m], and their derivatives by `gradients` [m, e].
        """
        ...


@runtime_checkable
class Scalable(Distance, Protocol):
    """A distance that knows which multiple of given gradients is nearest to what was sent."""

    def factor(self, gradients: Tensor, victims: Tensor) -> Tensor:
        """Return the positive factors [m] of gradients [m, e] that minimise the distance.

        Where no positive factor does, that which gives both sides the same norm is returned.
        """
        ...


class SquaredError:
    """‖g − t‖² / ‖t‖²: 0 for a perfect match, 1 for a gradient of zero.

    The division changes no minimum, but lets thresholds mean the same for every model and victim.

    Source: Zhu et al., "Deep Leakage from Gradients", NeurIPS 2019 (without the division).
    """

    def __init__(self, targets: Targets, relative: bool = True) -> None:
        """Take what the victims sent; without `relative` there is no division."""
        squares = targets.vectors.square().sum(1)
        self.targets = targets.vectors
        self.scale = 1 / positive(squares) if relative else torch.ones_like(squares)

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        residual, scale = gradients - self.targets.index_select(0, victims), self.scale[victims]
        loss = residual.square().sum(1) * scale
        return loss, residual.mul_(2 * scale[:, None])

    def factor(self, gradients: Tensor, victims: Tensor) -> Tensor:
        """See `Scalable`: ⟨g, t⟩ / ‖g‖²."""
        return _factor(gradients, gradients, self.targets[victims])


class BalancedError:
    """Σₗ ‖gₗ − tₗ‖²/‖tₗ‖ over parameters l, divided by Σₗ ‖tₗ‖, its value for a gradient of zero.

    Between the plain error, in which the last layer hides the others, and relative errors alone, in which the
    weakest layer counts as much as any. Only for gradients that were sent as they are: noise of the same strength
    in every entry is best matched by the plain error.
    """

    def __init__(self, targets: Targets) -> None:
        """Take what the victims sent."""
        norms = torch.stack([part.norm(dim=1) for part in targets.vectors.split(targets.sizes, 1)], 1)
        weights = 1 / (positive(norms) * positive(norms.sum(1, keepdim=True)))
        sizes = torch.tensor(targets.sizes, device=norms.device)
        self.targets, self.weights = targets.vectors, weights.repeat_interleave(sizes, 1)

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        residual = gradients - self.targets.index_select(0, victims)
        weighted = residual * self.weights[victims]
        return (weighted * residual).sum(1), weighted.mul_(2)

    def factor(self, gradients: Tensor, victims: Tensor) -> Tensor:
        """See `Scalable`: as for the squared error, weighted."""
        return _factor(gradients * self.weights[victims], gradients, self.targets[victims])


class CosineDistance:
    """1 − cos∠(g, t) over the whole gradient.

    Computed as ½‖g/‖g‖ − t/‖t‖‖², which is the same, because 1 − cos loses every digit in float32 long before an
    image is found: with PyTorch's initialisation the distance of a good image is 1e-8 and less.

    Source: Geiping et al., "Inverting Gradients", NeurIPS 2020, equation 4.
    """

    def __init__(self, targets: Targets) -> None:
        """Take what the victims sent."""
        self.directions = targets.vectors / positive(targets.vectors.norm(dim=1))[:, None]

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        norms = positive(gradients.norm(dim=1))[:, None]
        units = gradients / norms
        residual = units - self.directions.index_select(0, victims)
        along = (residual * units).sum(1, keepdim=True)
        loss = 0.5 * residual.square().sum(1)
        return loss, residual.sub_(along * units).div_(norms)


class SliceError:
    """Π_s (r_s / ‖t_s‖²)^(d_s / d) over slices s of d_s entries, r_s = ‖g_s − t_s‖²: 1 for a gradient of zero.

    Its minima are those of Σ_s d_s·log(r_s / d_s): the most probable image if every slice carries noise of a
    strength of its own that nobody knows. A slice that can be matched exactly pulls the product to zero, whatever
    the others do, so it is the intact slices that the search settles on.

    Where noisy slices were clipped first, each slice is compared both as it is and clipped, and the better counts.
    Otherwise the search is drawn to images whose gradients are small in the slices that were clipped.
    """

    def __init__(self, targets: Targets, bounds: tuple[int, ...], clipping_norm: float | None = None) -> None:
        """Take what the victims sent, and the bounds [n + 1] of the slices of a whole gradient.

        `clipping_norm` is the L2 norm to which noisy slices were clipped, in gradient units; None: not at all.
        """
        # Of a slice that is ignored in part, the length is not known.
        self.norm = None if targets.spans is not None else clipping_norm
        if targets.spans is not None:
            bounds = tuple(sum(len(range(bound)[span]) for span in targets.spans) for bound in bounds)
        sizes = torch.tensor(bounds, device=targets.vectors.device).diff()
        self.sizes, self.targets = sizes.tolist(), targets.vectors
        self.slices = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        self.shares = sizes.to(targets.vectors) / sizes.sum()
        self.squares = self._sums(targets.vectors.square())

    def _sums(self, values: Tensor) -> Tensor:
        # The least residual that counts keeps the logarithm finite where nothing is left to match.
        return self._by_slice(values).clamp_min(torch.finfo(values.dtype).tiny)

    def _by_slice(self, values: Tensor) -> Tensor:
        return torch.stack([part.sum(1) for part in values.split(self.sizes, 1)], 1)

    def _spread(self, values: Tensor) -> Tensor:
        return values.index_select(1, self.slices)

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        targets = self.targets[victims]
        residual = gradients - targets
        squares = self._sums(residual.square())
        if self.norm is not None:
            residual, squares = self._or_clipped(gradients, targets, residual, squares, self.norm)
        loss = (self.shares * (squares / self.squares[victims]).log()).sum(1).exp()
        slopes = 2 * loss[:, None] * self.shares / squares
        return loss, residual.mul_(self._spread(slopes))

    def _or_clipped(
        self, gradients: Tensor, targets: Tensor, residual: Tensor, squares: Tensor, norm: float
    ) -> tuple[Tensor, Tensor]:
        """Replace, in slices that match better clipped, the residual by half its square's derivative."""
        powers = self._sums(gradients.square())
        factor = (norm / powers.sqrt()).clamp(max=1)
        clipped = self._spread(factor) * gradients - targets
        along = self._by_slice(clipped * gradients) / powers
        half = self._spread(factor) * (clipped - self._spread(along) * gradients)
        least = torch.minimum(squares, self._sums(clipped.square()))
        return torch.where(self._spread(least < squares), half, residual), least


class LayerCosine:
    """Mean over parameters l of 1 − cos∠(g_l, t_l): every layer counts alike, however small its gradient.

    Source: Geiping et al., "Inverting Gradients", NeurIPS 2020, published code (cosine by layer).
    """

    def __init__(self, targets: Targets) -> None:
        """Take what the victims sent."""
        self.sizes = targets.sizes
        parts = targets.vectors.split(targets.sizes, 1)
        self.parts = [CosineDistance(Targets(part, (part.shape[1],))) for part in parts]

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        pieces = zip(self.parts, gradients.split(self.sizes, 1), strict=True)
        losses, slopes = zip(*(part(piece, victims) for part, piece in pieces), strict=True)
        return torch.stack(losses).mean(0), torch.cat(slopes, 1) / len(self.parts)


class AbsoluteError:
    """Σ_r |g − t_r| / Σ_r |t_r|: a few entries that are far off count for less than in the squared error.

    Over what a victim sent in R rounds it is what makes Laplacian noise of one strength most probable. It uses
    more than the rounds' mean or median: between the middle ones an entry costs nothing, and the others, which are
    not in doubt, settle where it lies.
    """

    def __init__(self, targets: Targets, repeats: Tensor | None = None) -> None:
        """Take what the victims sent, and what they sent in other rounds: `repeats` [N, R − 1, d], whole."""
        every = targets.vectors[:, None]
        if repeats is not None:
            if targets.spans is not None:
                repeats = torch.cat([repeats[:, :, span] for span in targets.spans], 2)
            every = torch.cat([every, repeats.to(every)], 1)
        sums = every.abs().sum((1, 2))
        self.targets, self.scale = every, 1 / torch.where(sums > 0, sums, 1)

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        residual, scale = gradients[:, None] - self.targets[victims], self.scale[victims]
        return residual.abs().sum((1, 2)) * scale, residual.sign_().sum(1).mul_(scale[:, None])


def positive(norms: Tensor) -> Tensor:
    """Return norms with 1 in place of 0, to divide by."""
    return torch.where(norms > 0, norms, 1)


def _factor(weighted: Tensor, gradients: Tensor, targets: Tensor) -> Tensor:
    dots, squares = (weighted * targets).sum(1), positive((weighted * gradients).sum(1))
    norms = targets.norm(dim=1) / positive(gradients.norm(dim=1))
    return torch.where(dots > 0, dots / squares, norms)
