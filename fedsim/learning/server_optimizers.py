"""Server optimisers: they turn the aggregate of a round into the next weights (Reddi et al., ICLR 2021)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from fedsim.schema import Schema

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

    def build(self, weights: Tensor) -> Optimizer:
        """Return the optimiser of `weights`."""
        return torch.optim.SGD([weights], lr=self.learning_rate, momentum=self.momentum)


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

    def build(self, weights: Tensor) -> Optimizer:
        """Return the optimiser of `weights`."""
        betas = (self.beta1, self.beta2)
        return torch.optim.Adam([weights], lr=self.learning_rate, betas=betas, eps=self.epsilon)


class YogiConfig(_Schedule):
    """Server Yogi (FedYogi): as Adam, with a second moment that moves additively."""

    name: Literal["yogi"] = "yogi"
    learning_rate: Rate = 0.01
    """Size of a step."""
    beta1: Momentum = 0.9
    """Decay of the first moment."""
    beta2: Momentum = 0.99
    """Decay of the second moment."""
    epsilon: Rate = 1e-3
    """Adaptivity τ: added to the root of the second moment, which starts at τ²."""

    def build(self, weights: Tensor) -> Optimizer:
        """Return the optimiser of `weights`."""
        return Yogi([weights], lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon)


ServerOptimizerConfig = Annotated[SgdConfig | AdamConfig | YogiConfig, Field(discriminator="name")]


class Yogi(Optimizer):
    """Yogi as in algorithm 2 of Reddi et al., "Adaptive Federated Optimization", ICLR 2021."""

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float) -> None:
        """Optimise `params` with rate `lr`, moment decays `betas` and adaptivity `eps`."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients held by the parameters."""
        for group in self.param_groups:
            (beta1, beta2), eps = group["betas"], group["eps"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.full_like(parameter, eps**2)
                first, second = state["exp_avg"], state["exp_avg_sq"]
                square = gradient.square()
                first.lerp_(gradient, 1 - beta1)
                second.sub_((1 - beta2) * square * torch.sign(second - square))
                parameter.addcdiv_(first, second.sqrt().add_(eps), value=-group["lr"])


class ServerOptimizer:
    """One flat weight vector and the optimiser that moves it."""

    def __init__(self, config: Any, weights: Tensor) -> None:
        """Start from `weights` [d]; they are copied."""
        self.weights = weights.clone()
        self._optimizer = config.build(self.weights)
        self._full_rate = config.learning_rate

    def step(self, pseudo_gradient: Tensor, rate: float = 1.0) -> Tensor:
        """Move along `pseudo_gradient` [d] at `rate` times the learning rate; return the weights [d]."""
        self._optimizer.param_groups[0]["lr"] = rate * self._full_rate
        self.weights.grad = pseudo_gradient
        self._optimizer.step()
        self.weights.grad = None
        return self.weights

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights and the optimiser's moments as named tensors."""
        state: dict[str, Tensor] = dict(self._optimizer.state.get(self.weights, {}))
        moments = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return {"weights": self.weights, **moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        with torch.no_grad():
            self.weights.copy_(state["weights"])
        moments = {name: value.clone() for name, value in state.items() if name != "weights"}
        if moments:
            self._optimizer.state[self.weights] = moments
