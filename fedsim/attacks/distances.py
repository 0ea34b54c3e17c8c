"""More distances between gradients, as alternatives to the cosine over the whole gradient."""

import torch
from torch import Tensor

from fedsim.attacks.gradient_matching import CosineDistance, Targets


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
    """Σ|g − t| / Σ|t|: a few entries that are far off count for less than in the squared error."""

    def __init__(self, targets: Targets) -> None:
        """Take what the victims sent."""
        sums = targets.vectors.abs().sum(1)
        self.targets, self.scale = targets.vectors, 1 / torch.where(sums > 0, sums, 1)

    def __call__(self, gradients: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distance`."""
        residual, scale = gradients - self.targets[victims], self.scale[victims]
        return residual.abs().sum(1) * scale, residual.sign_().mul_(scale[:, None])
