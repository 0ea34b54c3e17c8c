"""Gradients as few numbers for a network to read: principal components by block, and what these leave over."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

POWER_ITERATIONS = 2
"""Of the randomised decomposition; the spectra here fall off fast."""
OVERSAMPLING = 8
"""Directions more than are wanted that it works with."""
LIMIT = 6.0
"""Standard deviations at which a component is cut off: one that lies further out is all noise."""
LEAST_SPREAD = 0.5
"""Natural logarithms: what is left over varies by less from image to image, and then says nothing."""
QUARTILE = 0.31864
"""A quarter of the standard normal distribution lies between ± this."""


def principal_directions(rows: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal directions [d, r] that carry most of the square of `rows` [n, d], r ≤ rank.

    Source: Halko, Martinsson and Tropp, "Finding Structure with Randomness", SIAM Review 53(2), 2011, algorithm
    4.4 (randomised subspace iteration).
    """
    count, dimension = rows.shape
    rank = min(rank, count, dimension)
    width = min(rank + OVERSAMPLING, count, dimension)
    draws = torch.randn(dimension, width, generator=generator, device=rows.device, dtype=rows.dtype)
    basis = torch.linalg.qr(rows @ draws).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(rows @ torch.linalg.qr(rows.T @ basis).Q).Q
    directions: Tensor = torch.linalg.svd(basis.T @ rows, full_matrices=False).Vh[:rank].T.contiguous()
    return directions


def shared_ranks(sizes: Sequence[int], total: int) -> list[int]:
    """Share `total` components evenly by blocks of these sizes; what a small block cannot use others get."""
    ranks, left = [0] * len(sizes), total
    for place, block in enumerate(sorted(range(len(sizes)), key=lambda b: sizes[b])):
        ranks[block] = min(sizes[block], max(1, left // (len(sizes) - place)))
        left -= ranks[block]
    return ranks


class GradientFeatures(nn.Module):
    """Maps gradients [m, d] to standardised components [m, r] and leftovers [m, n] of n blocks.

    A block is a range of entries that are defended alike. Its leftover is the logarithm of the root-mean-square
    that its components do not explain: small for what an image alone gives, large where there is noise, so that a
    network can tell which blocks to believe. It is 0 where the components are a block's whole.
    """

    def __init__(
        self, gradients: Tensor, blocks: Sequence[slice], components: int, generator: torch.Generator
    ) -> None:
        """Find the components of undefended `gradients` [n, d] of public images, `components` in all."""
        super().__init__()
        self.blocks = tuple(blocks)
        self.register_buffer("mean", gradients.mean(0))
        self.widths: list[int] = []
        for number, rank in enumerate(shared_ranks([b.stop - b.start for b in blocks], components)):
            centred = gradients[:, blocks[number]] - self.get_buffer("mean")[blocks[number]]
            directions = principal_directions(centred, rank, generator)
            self.register_buffer(f"directions{number}", directions)
            self.widths.append(directions.shape[1])
        signal = self.raw(gradients)[0].square().mean(0)
        self.register_buffer("signal", signal)
        self.register_buffer("scale", torch.ones_like(signal))
        self.register_buffer("gain", torch.ones_like(signal))
        self.register_buffer("level", torch.zeros(len(blocks), device=gradients.device))
        self.register_buffer("spread", torch.ones(len(blocks), device=gradients.device))

    def standardise(self, components: Tensor, leftovers: Tensor) -> None:
        """Set the scales from the raw components [m, r] and leftovers [m, n] of what the server would see.

        The components' scale comes from their lower quartile: that of the draws that noise has spared, if any are.
        Each is then weighed by the share of its square that undefended gradients explain, as a Wiener filter does:
        what is all noise would only be learned by heart.
        """
        quarter = components.abs().kthvalue(max(1, len(components) // 4), 0).values / QUARTILE
        largest = quarter.max().clamp_min(torch.finfo(quarter.dtype).tiny)
        scale = torch.where(quarter > 1e-12 * largest, quarter, largest)
        self.get_buffer("scale").copy_(scale)
        self.get_buffer("gain").copy_((self.get_buffer("signal") / scale.square()).clamp(max=1))
        self.get_buffer("level").copy_(leftovers.mean(0))
        self.get_buffer("spread").copy_(leftovers.std(0).clamp_min(LEAST_SPREAD))

    def raw(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return components [m, r] and leftovers [m, n] before they are standardised."""
        components, leftovers = [], []
        for number, block in enumerate(self.blocks):
            centred = gradients[:, block] - self.get_buffer("mean")[block]
            found = centred @ self.get_buffer(f"directions{number}")
            components.append(found)
            if found.shape[1] == centred.shape[1]:
                leftovers.append(torch.zeros_like(found[:, 0]))
                continue
            open_ = (centred.square().sum(1) - found.square().sum(1)) / (block.stop - block.start)
            # Squares of float32 differ by rounding where components explain nearly all.
            floor = 1e-10 * centred.square().mean(1) + 1e-30
            leftovers.append(torch.maximum(open_, floor).log() / 2)
        return torch.cat(components, 1), torch.stack(leftovers, 1)

    def scaled(self, components: Tensor, leftovers: Tensor) -> tuple[Tensor, Tensor]:
        """Standardise raw features."""
        standard = (components / self.get_buffer("scale")).clamp(-LIMIT, LIMIT)
        return standard * self.get_buffer("gain"), (leftovers - self.get_buffer("level")) / self.get_buffer(
            "spread"
        )

    def forward(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.scaled(*self.raw(gradients))
