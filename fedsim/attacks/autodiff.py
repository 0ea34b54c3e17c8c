"""Gradients of many problems at once for any model, and the way back from derivatives by them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from fedsim.attacks.chain import Pullback
from fedsim.attacks.convolutions import FastConvolutions
from fedsim.learning.models import Model
from fedsim.privacy.observation import ONE_STEP, LocalTraining


class Autodiff:
    """Per-problem gradients of any model by automatic differentiation, through several local steps if need be.

    Source: Geiping et al., "Inverting Gradients", NeurIPS 2020, section 6 (federated averaging).
    """

    def __init__(
        self, model: Model, weights: Tensor, local: LocalTraining = ONE_STEP, singly: bool = False
    ) -> None:
        """Differentiate at flat `weights` [d].

        Args:
            model: The architecture.
            weights: Flat weights [d].
            local: The local training; each step uses the next of the images, evenly shared.
            singly: Whether `gradients` always gets one problem: then nothing is vectorised, and convolutions can
                be differentiated the faster way.
        """

        def loss(weights: Tensor, images: Tensor, probabilities: Tensor) -> Tensor:
            return F.cross_entropy(model.logits(weights, images), probabilities)

        def update(weights: Tensor, images: Tensor, probabilities: Tensor, rate: Tensor | float | None) -> Tensor:
            assert rate is not None
            batches = zip(*(t.chunk(local.steps) for t in (images, probabilities)), strict=True)
            total = torch.zeros_like(weights)
            for batch in batches:
                total = total + grad(loss)(weights - rate * total, *batch)
            return total

        self.weights, self.rate, self.singly = weights, local.learning_rate, singly
        self.one: Callable[..., Tensor] = update
        if local.steps == 1:
            self.one = lambda *arguments: grad(loss)(*arguments[:3])

    def gradients(
        self, images: Tensor, probabilities: Tensor, rates: Tensor | None = None
    ) -> tuple[Tensor, Pullback]:
        """See `Chain.gradients`; with `rates` [M], the local learning rates, the pull-back also gives theirs."""
        with torch.enable_grad():
            given = (images, probabilities) if rates is None else (images, probabilities, rates)
            inputs = [tensor.detach().requires_grad_() for tensor in given]
            gradients = self._every(*inputs)

        def pullback(v: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(gradients, inputs, v, materialize_grads=True)

        return gradients.detach(), pullback

    def _every(self, images: Tensor, probabilities: Tensor, rates: Tensor | float | None = None) -> Tensor:
        rates = self.rate if rates is None else rates
        if self.singly:
            rate = rates[0] if isinstance(rates, Tensor) else rates
            with FastConvolutions():
                return self.one(self.weights, images[0], probabilities[0], rate)[None]
        dims = None, 0, 0, 0 if isinstance(rates, Tensor) else None
        found: Tensor = vmap(self.one, in_dims=dims)(self.weights, images, probabilities, rates)
        return found
