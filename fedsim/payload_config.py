"""What a user says of a payload: the model, its input, what the attacker knows, and the attack."""

from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from fedsim.attacks import AttackConfig
from fedsim.attacks.gia import GIAConfig
from fedsim.errors import ConfigError
from fedsim.learning.models import LeNetConfig, ModelConfig
from fedsim.schema import NAME, Schema, explain
from fedsim.settings import merged


class PayloadAttackConfig(Schema):
    """What the attacker knows of a payload, and the attack."""

    name: str = Field(default="attack", pattern=NAME)
    """Name of the folder that results are written to."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the attack's draws."""
    model: ModelConfig = LeNetConfig()
    """The network; its weights come from the payload."""
    shape: tuple[int, int, int] = (3, 32, 32)
    """Shape of an image: channels, height, width."""
    classes: int = Field(default=10, ge=2)
    """Number of classes."""
    range: tuple[float, float] = (0.0, 1.0)
    """Values of the darkest and the brightest pixel, before `mean` and `std`."""
    mean: tuple[float, ...] = (0.0,)
    """What was subtracted from each channel before it went into the model; one number for all, or one each."""
    std: tuple[float, ...] = (1.0,)
    """What each channel was divided by after that."""
    batch_norm: Literal["train", "eval"] = "train"
    """Whether batch norm used the statistics of the batch or the averages among the weights."""
    momentum: float = Field(default=0.1, gt=0, le=1)
    """Batch norm's momentum, which tells the batch's statistics from the averages of two consecutive rounds."""
    batch_size: int | None = Field(default=None, ge=1)
    """Images behind the gradient; by default what the payload says, the number of labels, or 1."""
    labels: tuple[int, ...] | None = None
    """Their classes, if the attacker knows them; by default those in the payload."""
    local_steps: int = Field(default=1, ge=1)
    """Local SGD steps behind an update; they share the images evenly."""
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The client's learning rate; an update divided by it is in gradient units. Null: the attack estimates it."""
    attack: AttackConfig = GIAConfig()
    """The attack."""

    @model_validator(mode="after")
    def _fits(self) -> "PayloadAttackConfig":
        if not self.range[0] < self.range[1]:
            raise ValueError(
                f"range: {list(self.range)} must be the darkest and the brightest value, in this order"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.shape[0]):
                raise ValueError(f"{name}: one number, or one for each of the {self.shape[0]} channels")
        if min(self.std) <= 0:
            raise ValueError("std: must be positive")
        return self


def parse_payload_config(data: dict[str, Any], source: str = "settings") -> PayloadAttackConfig:
    """Check plain data laid over the defaults; ConfigError names the first wrong setting."""
    data = merged(PayloadAttackConfig().model_dump(mode="json"), data)
    try:
        return PayloadAttackConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, data)}") from None


class InputScale:
    """Brings images in [0, 1] to what the model was trained on: a forward pre-hook, which renames no parameter."""

    def __init__(self, config: PayloadAttackConfig) -> None:
        """Take range, mean and std."""
        (low, high), mean, std = config.range, torch.tensor(config.mean), torch.tensor(config.std)
        self.scale = ((high - low) / std)[:, None, None]
        self.shift = ((low - mean) / std)[:, None, None]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Scale the images."""
        images = inputs[0]
        return (images * self.scale.to(images) + self.shift.to(images), *inputs[1:])

    @property
    def is_identity(self) -> bool:
        """Whether there is nothing to scale."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())
