"""What an attacker assumes of images before seeing any gradient."""

import torch
from torch import Tensor


def total_variation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute difference between neighbouring pixels, across and down.

    Args:
        images: Shape [m, B, C, H, W], H and W at least 2.

    Returns:
        The anisotropic total variation of each problem, shape [m], and its derivative by `images` (where
        neighbours are equal, the subgradient 0).

    Source: Rudin, Osher and Fatemi, 1992; as a prior for gradient inversion: Geiping et al., NeurIPS 2020.
    """
    down, across = images.diff(dim=-2), images.diff(dim=-1)
    value = down.abs().flatten(1).mean(1) + across.abs().flatten(1).mean(1)
    problems = images.shape[0]
    down = down.sign_().mul_(problems / down.numel())
    across = across.sign_().mul_(problems / across.numel())
    gradient = torch.zeros_like(images)
    gradient[..., 1:, :] += down
    gradient[..., :-1, :] -= down
    gradient[..., 1:] += across
    gradient[..., :-1] -= across
    return value, gradient
