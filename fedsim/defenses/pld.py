"""Soteria (PLD in the tables): hide the features that betray the input in the first fully connected layer."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import vjp, vmap

from fedsim.defenses.base import ClientContext, Defense, DefenseSettings, Public, PublicContext
from fedsim.defenses.pruning import pruned_count
from fedsim.defenses.tangents import Unsupported, client_by_client, push_forward
from fedsim.learning.models import Model

PASS_VALUES = 2**20
"""Input values, tangents included, that go through the network at once: it bounds memory."""


class PLDConfig(DefenseSettings):
    """Zero the first fully connected layer's weight gradient at the features with the lowest scores."""

    name: Literal["pld"] = "pld"
    prune: float = Field(default=0.6, ge=0, lt=1)
    """Fraction of the layer's input features whose column is zeroed, lowest score first."""
    scores: Literal["probes", "exact"] = "probes"
    """How ‖∂r/∂x‖ is found: estimated by random directions, or exactly by one backward pass a feature."""
    probes: int = Field(default=4, ge=1)
    """Random directions to an image."""

    def build(self) -> "PLD":
        """Return the defense."""
        return PLD(self)

    def strategies(self) -> tuple[str, ...]:
        """The zero columns betray the pruned features, so there is nothing more to tell an oracle."""
        return ("survivors", "muted")


class PLD(Defense):
    """Zeroes the columns of low-scoring features in the first fully connected layer's weight gradient.

    A feature r_f, an input of that layer, scores the mean of ‖∂r_f/∂x‖ / (|r_f| + 0.1) over the client's
    batch. (The published codes score one image, or a gradient summed over the batch.) With batch norm, x is
    the whole batch: r_f of one image depends on all of them.

    Source:
        Sun et al., "Soteria: Provable Defense against Privacy Leakage in Federated Learning from Representation
        Perspective", CVPR 2021, equation 8 and its published code.
    """

    def __init__(self, settings: PLDConfig) -> None:
        """Take the settings."""
        self.settings = settings

    def prepare(self, context: PublicContext) -> Public:
        """Publish the seed of the probes, which clients can then share: they hide nothing."""
        generator = context.generator
        return {"probe_seed": torch.randint(2**62, (1,), generator=generator, device=generator.device)}

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        """Return a copy of `updates` [K, d] with the columns of each client's lowest features zeroed."""
        protected = updates.clone()
        name = context.model.first_linear
        columns = context.model.layout.views(protected)[f"{name}.weight".lstrip(".")]
        features = columns.shape[2]
        lowest = pruned_count(features, self.settings.prune)
        for rows, scores in self._scores(context):
            pruned = scores.topk(lowest, dim=1, largest=False).indices
            kept = torch.ones_like(scores).scatter_(1, pruned, 0.0)
            columns[rows] *= kept[:, None]
        return protected

    def _scores(self, context: ClientContext) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows [k] and their feature scores [k, features]."""
        model, weights = context.model, context.weights
        for batch in context.batches:
            if self.settings.scores == "exact":
                for row, images in zip(batch.rows.split(1), batch.images, strict=True):
                    yield row, _score(*exact_norms(model, weights, images))[None]
                continue
            probes = self._probes(batch.images, int(context.public["probe_seed"]))
            width = 1 if model.has_batch_norm else max(1, PASS_VALUES // probes.numel())
            for rows, images in zip(batch.rows.split(width), batch.images.split(width), strict=True):
                yield rows, _score(*probed_norms(model, weights, images, probes))

    def _probes(self, images: Tensor, seed: int) -> Tensor:
        """Draw the directions [P, B, C, H, W] that all clients with batches of this size share."""
        generator = torch.Generator(images.device).manual_seed(seed)
        shape = (self.settings.probes, *images.shape[1:])
        return torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)


def probed_norms(model: Model, weights: Tensor, images: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the norm of every feature's gradient by forward-mode products: E(J·v)_f² = ‖∂r_f/∂x‖².

    All probes share one pass of the images. An estimate of few probes is biased by a factor that is the same
    for all features, which a ranking ignores.

    Args:
        model: The architecture.
        weights: Global weights, shape [d].
        images: Local batches of k clients, shape [k, B, C, H, W].
        probes: Draws from N(0, 1), shape [P, B, C, H, W].

    Returns:
        Representations and estimated norms, each of shape [k, B, features].
    """

    def represent(images: Tensor) -> Tensor:
        return model.representation(weights, images)

    with torch.no_grad():
        try:
            # Batch norm couples the images of a batch: there clients must not share one.
            push = client_by_client if model.has_batch_norm else push_forward
            representations, tangents = push(represent, images, probes)
        except Unsupported:
            representations, tangents = client_by_client(represent, images, probes)
        return representations, tangents.square().mean(0).sqrt()


def exact_norms(model: Model, weights: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return representations and ‖∂r_f/∂x‖ of one client's images [B, C, H, W], each [B, features].

    Without batch norm, one backward pass serves a feature of all images, since each depends on its own image.
    """
    representation, pull = vjp(lambda x: model.representation(weights, x), images)[:2]
    if model.has_batch_norm:
        cotangents = torch.eye(representation.numel()).to(representation).view(-1, *representation.shape)
    else:
        cotangents = torch.eye(representation.shape[1]).to(representation)
        cotangents = cotangents[:, None].expand(-1, representation.shape[0], -1)
    width = max(1, PASS_VALUES // images.numel())
    squares = [vmap(pull)(block)[0].square() for block in cotangents.split(width)]
    if model.has_batch_norm:
        norms = torch.cat([block.flatten(1).sum(1) for block in squares]).view_as(representation)
    else:
        norms = torch.cat([block.flatten(2).sum(2) for block in squares]).T
    return representation.detach(), norms.sqrt()


def _score(representation: Tensor, norms: Tensor) -> Tensor:
    """Return the mean of norms / (|r| + 0.1) over the batch, the second last dimension."""
    return (norms / (representation.abs() + 0.1)).mean(-2)
