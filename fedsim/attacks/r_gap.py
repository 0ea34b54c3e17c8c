"""R-GAP: the image behind a gradient by one linear system a layer, from the last layer to the first."""

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.attacks.activations import ACTIVATIONS
from fedsim.attacks.base import Attack, ClosedFormSettings
from fedsim.attacks.chain import Chain, Entries, Layer, chain_of
from fedsim.attacks.distances import BalancedError
from fedsim.attacks.gradient_matching import loss_at
from fedsim.attacks.labels import sign_rule
from fedsim.attacks.last_layer import LastLayer, last_layer
from fedsim.attacks.layer_systems import LayerSystem, equations, layer_system, projected, unknowns
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation, Reconstruction

MOST_BYTES = 2**31
"""Largest system of equations that is set up for a layer."""

FAINT = 1e-5
"""Share of the largest value of a ReLU layer's output below which a recovered value is taken for zero."""


class RGAPConfig(ClosedFormSettings):
    """R-GAP (Zhu and Blaschko, ICLR 2021): layer by layer in closed form; one image, a chain of layers."""

    name: Literal["r_gap"] = "r_gap"
    resolution: float = Field(default=1e-6, gt=0, le=1)
    """Share of a layer's largest singular value below which its equations say nothing; 1e-6 is what the rounding
    of a gradient in float32 leaves. A larger one leaves at mid-grey what noise would tear apart."""

    def check(self, model: Model, batch_size: int) -> None:
        """See `AttackSettings.check`: one image, a plain chain of layers, systems that fit into memory."""
        if batch_size != 1:
            raise ConfigError(f"r_gap inverts single images, but each gradient comes from {batch_size}")
        for layer in filter(_convolves, _chain(model, model.initial_weights()).layers):
            size = 8 * equations(layer) * unknowns(layer)
            if size > MOST_BYTES:
                raise ConfigError(
                    f"r_gap needs {size / 2**30:,.1f} GiB for the equations of {layer.weight}, more than the "
                    f"{MOST_BYTES / 2**30:g} GiB it may take; use a smaller model, or dlg or gia"
                )

    def build(self) -> Attack:
        """Return the attack."""
        return RGAP(self.resolution)


class RGAP(Attack):
    """Recovers each layer's input from its output and its gradient, the last layer's first.

    The published attack is for binary labels, where one equation tells the logit. With cross-entropy over classes
    δ = p − y of the last layer is its bias gradient, or follows from its weight gradient (see `last_layer`).
    Where the activation tells what a layer put out (all but ReLU's zeros) there are weight constraints as well as
    gradient constraints. What both leave open stays at mid-grey, and in hidden layers at f(0).

    The loss is the balanced error of the gradient, see `BalancedError`.

    Source: Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021.
    """

    def __init__(self, resolution: float = 1e-6) -> None:
        """Take the share of the largest singular value below which a system says nothing."""
        self.resolution = resolution

    def matching_loss(self, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
        """See `Attack`."""
        return loss_at(observation, BalancedError, (), images, labels)

    def reconstruct(self, observation: Observation) -> Reconstruction:
        """See `Attack`."""
        began = time.perf_counter()
        labels = sign_rule(observation)
        found = [self._invert(observation, victim) for victim in range(observation.victims)]
        images = torch.stack([image for image, _ in found]).to(observation.weights)
        rates = torch.tensor([rate for _, rate in found]).to(images)
        count = torch.zeros_like(labels[:, 0])
        return Reconstruction(
            images=images,
            labels=labels,
            loss=self.matching_loss(observation, images, labels),
            iterations=count,
            stalled=count.bool(),
            exhausted=count.bool(),
            seconds=time.perf_counter() - began,
            learning_rates=rates if observation.local.learning_rate is None else None,
        )

    def _invert(self, observation: Observation, victim: int) -> tuple[Tensor, float]:
        """Return the image [1, C, H, W] of one victim, and the learning rate (1 where it is known)."""
        chain = _chain(observation.model, observation.weights.double())
        sent = observation.gradients[victim : victim + 1].double()
        known = observation.local.learning_rate is not None
        last = last_layer(chain.own[-1], chain.arrange(sent)[-1], known)
        neutral = [0.5, *(float(layer.activation.function(torch.zeros(()))) for layer in chain.layers)]

        def solve(index: int, system: LayerSystem) -> Tensor:
            start = system.matrix.new_full((system.matrix.shape[1],), neutral[index])
            return system.solve(start, self.resolution)

        x = recurse(chain, chain.arrange(sent / last.rate), last, solve)
        return _as_image(x, chain), last.rate


def recurse(
    chain: Chain, gradients: list[Entries], last: LastLayer, solve: Callable[[int, LayerSystem], Tensor]
) -> Tensor:
    """Go from the last layer to the first, and return the input of the first, channels last and flat.

    Args:
        chain: The layers, at float64 weights.
        gradients: What each layer's parameters received, [1, …] each.
        last: Input and δ of the last layer.
        solve: Gives a convolution's input, flat, from its number and its equations.
    """
    x, delta = last.input, last.delta[None]
    for index in reversed(range(len(chain.layers) - 1)):
        layer, own = chain.layers[index], chain.own[index]
        a = x.view(1, *layer.cutter.output_shape)
        if layer.activation is ACTIVATIONS[nn.ReLU]:
            a = F.threshold(a, FAINT * float(a.max().clamp_min(0)), 0.0)
        by_output = chain.layers[index + 1].pull_back(delta, chain.own[index + 1])
        delta = by_output.view_as(a) * layer.activation.slope(a)
        gradient = gradients[index].weight[0]
        if _convolves(layer):
            z = layer.activation.inverse(a)
            x = solve(index, layer_system(layer, own, gradient, delta.flatten(0, 2), z.flatten(0, 2)))
        else:
            x = projected(gradient, delta[0])
    return x


class LayerRank(NamedTuple):
    """What the equations of one layer determine at a given image.

    Attributes:
        layer: Name of the layer's weight.
        unknowns: Values in its input.
        weight_constraints: Equations from its output.
        gradient_constraints: Equations from its weight gradient.
        rank: Singular values above 1e-6 of the largest: directions that a float32 gradient can tell.
        condition: Largest singular value over the least of these.
    """

    layer: str
    unknowns: int
    weight_constraints: int
    gradient_constraints: int
    rank: int
    condition: float

    @property
    def deficiency(self) -> int:
        """Directions of the input that stay open; 0: the layer can be inverted."""
        return self.unknowns - self.rank


@torch.no_grad()
def rank_analysis(model: Model, weights: Tensor, image: Tensor, label: int) -> list[LayerRank]:
    """Return what each layer's equations determine, the first layer's first, if all behind it are inverted.

    Args:
        model: A plain chain of layers.
        weights: Flat weights [d].
        image: An image [C, H, W].
        label: Its class.

    Raises:
        ConfigError: If the model is no such chain.

    Source: Zhu and Blaschko, ICLR 2021 (rank analysis), by the rank of the equations themselves.
    """
    chain = _chain(model, weights.double())
    inputs = [image.double().permute(1, 2, 0)[None]]
    for layer, own in zip(chain.layers, chain.own, strict=True):
        inputs.append(layer.forward(inputs[-1], own)[0])
    delta = inputs[-1].softmax(-1)[0]
    delta[label] -= 1
    answer = F.one_hot(torch.tensor([[label]], device=weights.device), model.classes).double()
    gradients, _ = chain.gradients(image.double()[None, None], answer)
    found = [
        LayerRank(layer.weight, size := unknowns(layer), 0, own.weight[0].numel(), size, 1.0)
        for layer, own in zip(chain.layers, chain.own, strict=True)
    ]

    def note(index: int, system: LayerSystem) -> Tensor:
        values, weight = system.singular_values(), system.weight_constraints
        rank = int((values > 1e-6 * values[0]).sum())
        condition = float(values[0] / values[rank - 1])
        found[index] = found[index]._replace(weight_constraints=weight, rank=rank, condition=condition)
        return inputs[index].flatten()

    last = LastLayer(inputs[len(chain.layers) - 1].flatten(), delta, 1.0)
    recurse(chain, chain.arrange(gradients), last, note)
    return found


def _chain(model: Model, weights: Tensor) -> Chain:
    chain = chain_of(model, weights)
    if chain is None:
        raise ConfigError(
            "r_gap needs a plain chain of convolutions, linear layers and activations that takes pixels as they "
            "are, such as model.name: lenet, lenet4 or mlp"
        )
    return chain


def _convolves(layer: Layer) -> bool:
    return len(layer.cutter.output_shape) > 1


def _as_image(x: Tensor, chain: Chain) -> Tensor:
    height, width, channels = chain.layers[0].cutter.input_shape
    return x.view(1, height, width, channels).permute(0, 3, 1, 2)
