"""Gradients of gradients for plain chains of layers, faster than automatic differentiation.

Gradient matching needs, for M independent problems, the parameter gradient g(x) ∈ R^d of a small network at
shared weights w, and its pull-back vᵀ∂g/∂x for a v ∈ R^d of each problem's own. The pull-back is a directional
derivative, vᵀ∂g/∂x = d/dε ∇ₓL(x, w + εv) at ε = 0, so one forward and one backward sweep that carry
ε-derivatives (called `r`) beside the values give it: no graph, and no graph of a graph.

Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1), 1994.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedsim.attacks.activations import IDENTITY, Activation, activation_of
from fedsim.attacks.patches import ConvolutionRows, Cutter, LinearRows
from fedsim.learning.models import Model

Pullback = Callable[[Tensor], tuple[Tensor, ...]]
"""Maps v [M, d] to vᵀ∂g/∂images [M, B, C, H, W] and vᵀ∂g/∂probabilities [M, B, classes]; where learning rates are
given and matter, also to vᵀ∂g/∂rates [M]."""


class Entries(NamedTuple):
    """A layer's part of flat vectors [m, d], arranged for products with rows.

    Shapes: weight [m, O, K]; bias [m, O], or None for a layer without; transposed [m, K′, C′].
    """

    weight: Tensor
    bias: Tensor | None
    transposed: Tensor


class _Forward(NamedTuple):
    """What a layer keeps of its forward sweep: its input's rows [N, P, K], f′(z) and f″(z)/f′(z)."""

    rows: Tensor
    slope: Tensor
    bend: Tensor


class _Backward(NamedTuple):
    """What a layer keeps of its backward sweep: δ = ∂L/∂z and δ's rows for the transposed layer."""

    delta: Tensor
    rows: Tensor


@dataclass
class Layer:
    """One affine layer, the names of its parameters, and the activation behind it."""

    cutter: Cutter
    weight: str
    bias: str | None
    activation: Activation

    def arrange(self, views: dict[str, Tensor]) -> Entries:
        """Take the layer's part of a flat vector's views [m, *shape]."""
        weight, bias = views[self.weight], None if self.bias is None else views[self.bias]
        return Entries(self.cutter.order(weight), bias, self.cutter.transposed(weight))

    def forward(self, x: Tensor, own: Entries) -> tuple[Tensor, _Forward]:
        """Return the layer's output and what the other sweeps need."""
        rows = self.cutter.cut(x)
        z = _apply(rows, own.weight.mT, own.bias).view(-1, *self.cutter.output_shape)
        a = self.activation.function(z)
        return a, _Forward(rows, self.activation.slope(a), self.activation.bend(a))

    def backward(self, by_output: Tensor, seen: _Forward) -> _Backward:
        """Turn ∂L/∂output into ∂L/∂z."""
        delta = by_output * seen.slope
        return _Backward(delta, self.cutter.cut_back(delta))

    def gradients(self, problems: int, seen: _Forward, back: _Backward) -> dict[str, Tensor]:
        """Return ∂L/∂parameter, flat, by name: [problems, size]."""
        delta = back.delta.reshape(problems, -1, back.delta.shape[-1])
        weight = torch.bmm(delta.mT, _by_problem(seen.rows, problems))
        found = {self.weight: self.cutter.restore(weight)}
        return found if self.bias is None else found | {self.bias: delta.sum(1)}

    def by_input(self, back: _Backward, own: Entries) -> Tensor:
        """Return ∂L/∂input."""
        return self.cutter.assemble(_apply(back.rows, own.transposed))

    def pull_back(self, delta: Tensor, own: Entries) -> Tensor:
        """Return ∂L/∂input given δ = ∂L/∂z alone."""
        return self.by_input(_Backward(delta, self.cutter.cut_back(delta)), own)

    def r_forward(self, r: Tensor | None, seen: _Forward, own: Entries, direction: Entries) -> Tensor:
        """Return the ε-derivative of z, given that of the input (None: the input does not depend on ε)."""
        z = _apply(_by_problem(seen.rows, len(direction.weight)), direction.weight.mT, direction.bias)
        if r is not None:
            z = _add(z, self.cutter.cut(r), own.weight.mT)
        return z.view(-1, *self.cutter.output_shape)

    def r_backward(self, r: Tensor, back: _Backward, own: Entries, direction: Entries) -> Tensor:
        """Return the ε-derivative of ∂L/∂input, given that of δ."""
        rows = _apply(_by_problem(back.rows, len(direction.weight)), direction.transposed)
        return self.cutter.assemble(_add(rows, self.cutter.cut_back(r), own.transposed))


def _apply(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows [m, P, K] by each problem's own matrix [m, K, O], or by one for all [1, K, O]."""
    if len(matrix) == 1:
        flat = rows.reshape(-1, rows.shape[-1])
        return flat @ matrix[0] if bias is None else torch.addmm(bias[0], flat, matrix[0])
    return torch.bmm(rows, matrix) if bias is None else torch.baddbmm(bias[:, None], rows, matrix)


def _add(total: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """Add `rows` times the matrix shared by all problems to `total`, in place."""
    flat = total.view(-1, total.shape[-1])
    return flat.addmm_(rows.view(-1, rows.shape[-1]), matrix[0])


def _by_problem(rows: Tensor, problems: int) -> Tensor:
    return rows.view(problems, -1, rows.shape[-1])


class Chain:
    """A model that is a chain of convolutions, linear layers and activations, at fixed weights."""

    def __init__(self, layers: list[Layer], model: Model, weights: Tensor) -> None:
        """Take flat `weights` [d]; `chain_of` finds the layers."""
        self.layers, self.layout = layers, model.layout
        self.own = self.arrange(weights[None])

    @torch.no_grad()
    def gradients(
        self, images: Tensor, probabilities: Tensor, rates: Tensor | None = None
    ) -> tuple[Tensor, Pullback]:
        """Return the parameter gradients of M problems and their pull-back.

        Args:
            images: Shape [M, B, C, H, W].
            probabilities: Soft labels, each summing to 1, shape [M, B, classes].
            rates: Local learning rates, which do not matter for the one step that is taken here.

        Returns:
            Gradients of the mean cross-entropy, shape [M, d], in layout order; and their pull-back.
        """
        x = images.flatten(0, 1).permute(0, 2, 3, 1)
        seen: list[_Forward] = []
        for layer, own in zip(self.layers, self.own, strict=True):
            x, kept = layer.forward(x, own)
            seen.append(kept)
        soft = x.softmax(-1)
        back = self._backward((soft - probabilities.flatten(0, 1)) / images.shape[1], seen)
        found: dict[str, Tensor] = {}
        for layer, f, b in zip(self.layers, seen, back, strict=True):
            found |= layer.gradients(len(images), f, b)
        whole = torch.cat([found[name] for name in self.layout.names], 1)
        return whole, lambda v: self._pull(v, probabilities.shape, soft, seen, back)

    def _backward(self, by_output: Tensor, seen: list[_Forward]) -> list[_Backward]:
        kept: list[_Backward] = []
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            kept.append(layer.backward(by_output, seen[index]))
            if index > 0:
                by_output = layer.by_input(kept[-1], self.own[index])
        return kept[::-1]

    @torch.no_grad()
    def _pull(
        self, v: Tensor, shape: torch.Size, soft: Tensor, seen: list[_Forward], back: list[_Backward]
    ) -> tuple[Tensor, Tensor]:
        steps = list(zip(self.layers, seen, back, self.own, self.arrange(v), strict=True))
        r: Tensor | None = None
        bends: list[Tensor] = []
        for layer, f, b, own, direction in steps:
            z = layer.r_forward(r, f, own, direction)
            r = z * f.slope
            bends.append(z * f.bend * b.delta)
        assert r is not None
        r = (r - (soft * r).sum(-1, keepdim=True)) / shape[1]
        by_probabilities = -r.view(shape)
        r = soft * r
        for (layer, f, b, own, direction), bend in zip(reversed(steps), reversed(bends), strict=True):
            r = layer.r_backward(r * f.slope + bend, b, own, direction)
        return r.view(*shape[:2], *r.shape[1:]).permute(0, 1, 4, 2, 3), by_probabilities

    def arrange(self, vectors: Tensor) -> list[Entries]:
        """Return each layer's part of flat vectors [m, d]."""
        views = self.layout.views(vectors)
        return [layer.arrange(views) for layer in self.layers]


def chain_of(model: Model, weights: Tensor) -> Chain | None:
    """Return `model` at flat `weights` [d] as a chain, or None where it is anything but one."""
    channels, height, width = model.shape
    shape: tuple[int, ...] = (height, width, channels)
    layers: list[Layer] = []
    activated = flattened = False
    # Modules that occur twice must be met twice, or the second would go unnoticed.
    for name, module in model.module.named_modules(remove_duplicate=False):
        if module._forward_pre_hooks or module._forward_hooks:  # they may change what passes through
            return None
        if type(module) is nn.Sequential:
            continue
        activation = activation_of(module)
        if activation is not None and layers and not activated:
            layers[-1].activation, activated = activation, True
        elif type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
            flattened = True
        elif (layer := _affine(name, module, shape, flattened, model)) is not None:
            layers.append(layer)
            shape, activated = layer.cutter.output_shape, False
        else:
            return None
    ends_in_logits = bool(layers) and shape == (model.classes,) and not activated
    return Chain(layers, model, weights) if ends_in_logits else None


def _affine(name: str, module: nn.Module, shape: tuple[int, ...], flattened: bool, model: Model) -> Layer | None:
    if type(module) is nn.Linear and flattened:
        cutter: Cutter = LinearRows(module, shape)
    elif type(module) is nn.Conv2d and not flattened and _is_plain(module):
        cutter = ConvolutionRows(module, shape)
    else:
        return None
    if f"{name}.weight" not in model.layout.names:  # shared with a layer that came before
        return None
    bias = None if module.bias is None else f"{name}.bias"
    return Layer(cutter, f"{name}.weight", bias, IDENTITY)


def _is_plain(layer: nn.Conv2d) -> bool:
    square = all(len(set(pair)) == 1 for pair in (layer.kernel_size, layer.stride, layer.padding))
    return (
        square
        and layer.padding != "same"
        and layer.padding_mode == "zeros"
        and layer.groups == 1
        and layer.dilation == (1, 1)
    )
