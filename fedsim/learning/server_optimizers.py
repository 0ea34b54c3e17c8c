"""Server optimisers: they turn the aggregate of a round into the next weights (Reddi et al., ICLR 2021).

They give the bits of `torch.optim`, whose optimisers import PyTorch's compiler when the first one is made: that
would be more than a second of every start.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.schema import Schema

Moments = dict[str, Tensor]
"""What an optimiser remembers, by name; empty before the first step."""
Momentum = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Schedule(Schema):
    warmup_rounds: int = Field(default=0, ge=0)
    """Rounds over which the learning rate rises linearly to its full value."""
    decay_rounds: int = Field(default=0, ge=0)
    """Last rounds of the run, over which the learning rate falls linearly to zero."""

    def rate(self, round_: int, rounds: int) -> float:
        """Return the factor on the learning rate in a round, 0–1, for a run of `rounds` rounds."""
        warm = min(1.0, (round_ + 1) / self.warmup_rounds) if self.warmup_rounds else 1.0
        left = min(1.0, max(0, rounds - round_) / self.decay_rounds) if self.decay_rounds else 1.0
        return warm * left


class SgdConfig(_Schedule):
    """Server SGD; rate 1 without momentum is plain averaging (FedAvg, McMahan et al., 2017)."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Rate = 1.0
    """Step on the pseudo-gradient, which already holds the clients' learning rate."""
    momentum: Momentum = 0.0
    """Heavy-ball momentum (FedAvgM)."""

    def step(self, weights: Tensor, gradient: Tensor, rate: float, moments: Moments) -> None:
        """Move `weights` [d] along `gradient` [d] at the learning rate `rate`, and `moments` with them."""
        if self.momentum and moments:
            gradient = moments["momentum_buffer"].mul_(self.momentum).add_(gradient)
        elif self.momentum:
            moments["momentum_buffer"] = gradient = gradient.clone()
        weights.add_(gradient, alpha=-rate)


class AdamConfig(_Schedule):
    """Server Adam with bias correction (FedAdam)."""

    name: Literal["adam"] = "adam"
    learning_rate: Rate = 0.01
    """Size of a step."""
    beta1: Momentum = 0.9
    """Decay of the first moment."""
    beta2: Momentum = 0.999
    """Decay of the second moment."""
    epsilon: Rate = 1e-8
    """Added to the root of the second moment."""

    def step(self, weights: Tensor, gradient: Tensor, rate: float, moments: Moments) -> None:
        """Move `weights` [d] along `gradient` [d] at the learning rate `rate`, and `moments` with them."""
        if not moments:
            moments |= {"step": torch.tensor(0.0)}
            moments |= {name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_sq")}
        steps = moments["step"].add_(1).item()
        first = moments["exp_avg"].lerp_(gradient, 1 - self.beta1)
        second = moments["exp_avg_sq"].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = (second.sqrt() / (1 - self.beta2**steps) ** 0.5).add_(self.epsilon)
        weights.addcdiv_(first, root, value=-rate / (1 - self.beta1**steps))


class YogiConfig(_Schedule):
    """Server Yogi (FedYogi): as Adam without bias correction, with a second moment that moves additively.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.
    """

    name: Literal["yogi"] = "yogi"
    learning_rate: Rate = 0.01
    """Size of a step."""
    beta1: Momentum = 0.9
    """Decay of the first moment."""
    beta2: Momentum = 0.99
    """Decay of the second moment."""
    epsilon: Rate = 1e-3
    """Adaptivity τ: added to the root of the second moment, which starts at τ²."""

    def step(self, weights: Tensor, gradient: Tensor, rate: float, moments: Moments) -> None:
        """Move `weights` [d] along `gradient` [d] at the learning rate `rate`, and `moments` with them."""
        if not moments:
            moments["exp_avg"] = torch.zeros_like(weights)
            moments["exp_avg_sq"] = torch.full_like(weights, self.epsilon**2)
        first, second, square = moments["exp_avg"], moments["exp_avg_sq"], gradient.square()
        first.lerp_(gradient, 1 - self.beta1)
        second.sub_((1 - self.beta2) * square * torch.sign(second - square))
        weights.addcdiv_(first, second.sqrt().add_(self.epsilon), value=-rate)


ServerOptimizerConfig = Annotated[SgdConfig | AdamConfig | YogiConfig, Field(discriminator="name")]


class ServerOptimizer:
    """One flat weight vector and the optimiser that moves it."""

    def __init__(self, config: Any, weights: Tensor) -> None:
        """Start from `weights` [d]; they are copied."""
        self.weights = weights.clone()
        self._config = config
        self._moments: Moments = {}

    @torch.no_grad()
    def step(self, pseudo_gradient: Tensor, rate: float = 1.0) -> Tensor:
        """Move along `pseudo_gradient` [d] at `rate` times the learning rate; return the weights [d]."""
        self._config.step(self.weights, pseudo_gradient, rate * self._config.learning_rate, self._moments)
        return self.weights

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights and the optimiser's moments as named tensors."""
        return {"weights": self.weights, **self._moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.weights.copy_(state["weights"])
        self._moments = {name: value.clone() for name, value in state.items() if name != "weights"}
