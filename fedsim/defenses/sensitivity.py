"""Leakage risk: how much each parameter's gradient depends on the input image."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

from fedsim.defenses.base import PER_SAMPLE_BYTES, PublicContext

BATCH_NORM_BATCH = 10
"""Root images to a batch where batch norm makes the gradient of one image depend on its neighbours."""

BASIS_BLOCK = 16
"""Unit vectors that the exact risk pushes forward at once."""


def frobenius_risk(context: PublicContext, probes: int | None) -> Tensor:
    """Return the mean of ‖∂g_l/∂x‖_F over the root set for each parameter l, shape [L].

    The norms are estimated for all parameters at once: for u of random signs in the shape of the input,
    E‖J_l·u‖² = ‖J_l‖_F², and one forward-mode product gives J_l·u for every l. (The other side, ±1 vectors
    against g_l, costs one backward pass a parameter.)

    With batch norm no image has a gradient of its own. J_l is then the Jacobian of the mean gradient of a
    batch with respect to the whole batch, and √(batch size)·‖J_l‖_F takes the place of the norm: the root
    mean square over the images of what it would be without batch norm. Its probes have as many signs as a
    batch has values, so few are needed: each goes to a batch of its own while there are unused ones.

    Args:
        context: Model, weights and root set.
        probes: Number of sign vectors to an image (with batch norm: in all); None: the exact norm, which
            takes one product for each value of the input.

    Source:
        Wang et al., "Protect Privacy from Gradient Leakage Attack in Federated Learning", INFOCOM 2022
        (leakage risk); Hutchinson, 1990 (the estimator).
    """
    images, labels = _units(context)
    if probes is None:
        blocks = _basis(images)
    elif context.model.has_batch_norm:
        images, labels = images[:probes], labels[:probes]
        blocks = _signs(images, -(-probes // len(images)), context.generator)
    else:
        blocks = _signs(images, probes, context.generator)
    squares = torch.stack([_squared_products(context, images, labels, block) for block in blocks]).sum(0)
    return (images.shape[1] * squares).sqrt().mean(0)


def _units(context: PublicContext) -> tuple[Tensor, Tensor]:
    """Group the root set into units [U, b, C, H, W] and labels [U, b]: single images, or shuffled batches."""
    images, labels = context.root_images, context.root_labels
    if not context.model.has_batch_norm:
        return images[:, None], labels[:, None]
    size = min(BATCH_NORM_BATCH, len(labels))
    shape = (len(labels) // size, size)
    device = context.generator.device
    order = torch.randperm(len(labels), generator=context.generator, device=device)
    order = order[: shape[0] * size].view(shape).to(labels.device)
    return images[order], labels[order]


def _signs(images: Tensor, probes: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield one block [U, probes, b, C, H, W] of signs, scaled so that its squares sum to an estimate."""
    shape = (images.shape[0], probes, *images.shape[1:])
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=images.dtype)
    yield torch.where(uniform < 0.5, -1.0, 1.0).to(images) / probes**0.5


def _basis(images: Tensor) -> Iterator[Tensor]:
    """Yield blocks [U, n, b, C, H, W] of the unit vectors of the input of one unit."""
    values = images[0].numel()
    for start in range(0, values, BASIS_BLOCK):
        index = torch.arange(start, min(start + BASIS_BLOCK, values), device=images.device)
        block = torch.zeros(len(index), values, dtype=images.dtype, device=images.device)
        block[torch.arange(len(index), device=images.device), index] = 1
        yield block.view(-1, *images.shape[1:]).expand(images.shape[0], *[-1] * images.dim())


def _squared_products(context: PublicContext, images: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """Return Σ over the directions u of ‖J_l·u‖² for each unit and parameter, shape [U, L]."""
    model, weights = context.model, context.weights.detach()

    def gradient(images: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = grad(lambda w: F.cross_entropy(model.logits(w, images), labels))(weights)
        return result

    def squares(images: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
        def product(direction: Tensor) -> Tensor:
            tangent = jvp(lambda x: gradient(x, labels), (images,), (direction,))[1]
            return torch.stack([part.square().sum() for part in tangent.split(model.layout.sizes)])

        return vmap(product)(directions).sum(0)

    one_unit = directions.shape[1] * weights.numel() * weights.element_size()
    width = 1 if model.has_batch_norm else max(1, PER_SAMPLE_BYTES // one_unit)
    result: Tensor = vmap(squares, chunk_size=width)(images, labels, directions)
    return result


def published_risk(context: PublicContext) -> Tensor:
    """Return the published code's sensitivity of each parameter, shape [L] (trap 1).

    It is the mean over the root set of ‖∂(Σ g_l)/∂x‖₂, a product of the Jacobian with ones, where g_l is the
    gradient of the mean loss of the whole root set. The entries of a last layer's gradient sum to zero over
    the classes, so the layer that leaks most comes out as harmless.

    Source: The published code, `sensitivity.py`.
    """
    with torch.enable_grad():
        images = context.root_images.detach().clone().requires_grad_()
        weights = context.weights.detach().clone().requires_grad_()
        loss = F.cross_entropy(context.model.logits(weights, images), context.root_labels)
        (flat,) = torch.autograd.grad(loss, weights, create_graph=True)
        sums = [part.sum() for part in flat.split(context.model.layout.sizes)]
        products = [torch.autograd.grad(total, images, retain_graph=True)[0] for total in sums]
    return torch.stack([torch.linalg.vector_norm(p.flatten(1), dim=1).mean() for p in products])
