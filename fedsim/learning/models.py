"""The models of the tables, each for 1×28×28 and 3×32×32 input, and a user's own.

Two facts about a model choose how clients are trained on a CPU: whether its kernels gain from images that lie
channels-last, and up to which local batch one pass for all clients (`fused`) pays, 0 for never.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.errors import ConfigError
from fedsim.learning import batch_norm
from fedsim.learning.layout import ParameterLayout
from fedsim.plugins import load_attribute
from fedsim.randomness import Purpose, torch_stream
from fedsim.schema import Schema

Initialisation = Literal["default", "uniform"]


class LeNetConfig(Schema):
    """The LeNet of DLG (Zhu et al., NeurIPS 2019): three 5×5 convolutions, sigmoids, one linear layer."""

    channels_last: ClassVar[bool] = True
    fused_batch: ClassVar[int] = 64
    name: Literal["lenet"] = "lenet"
    init: Initialisation = "default"
    """`default`: PyTorch's; `uniform`: U(−0.5, 0.5) on weights and biases, as in DLG."""

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build the module with PyTorch's initialisation."""
        return _lenet(shape, classes, strides=(2, 2, 1))


class LeNet4Config(Schema):
    """The LeNet of Soteria (Sun et al., CVPR 2021): as `lenet`, with a fourth convolution of stride 1."""

    channels_last: ClassVar[bool] = True
    fused_batch: ClassVar[int] = 64
    name: Literal["lenet4"] = "lenet4"
    init: Initialisation = "default"
    """`default`: PyTorch's; `uniform`: U(−0.5, 0.5) on weights and biases, as in DLG."""

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build the module with PyTorch's initialisation."""
        return _lenet(shape, classes, strides=(2, 2, 1, 1))


class ConvNet64Config(Schema):
    """ConvNet of width 64 (Geiping et al., NeurIPS 2020; listed in the slides): 2,904,970 parameters on CIFAR."""

    channels_last: ClassVar[bool] = True
    fused_batch: ClassVar[int] = 0
    name: Literal["convnet64"] = "convnet64"
    init: Initialisation = "default"
    """`default`: PyTorch's; `uniform`: U(−0.5, 0.5) on weights and biases, as in DLG."""

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build the module with PyTorch's initialisation."""
        return ConvNet64(shape, classes)


class MLPConfig(Schema):
    """Fully connected layers with ReLU on the flattened image, which the first one's gradient gives away."""

    channels_last: ClassVar[bool] = False
    fused_batch: ClassVar[int] = 1_000_000
    name: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = Field(default=(256,), min_length=1)
    """Widths of the hidden layers."""
    init: Initialisation = "default"
    """`default`: PyTorch's; `uniform`: U(−0.5, 0.5) on weights and biases, as in DLG."""

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build the module with PyTorch's initialisation."""
        widths = (shape[0] * shape[1] * shape[2], *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


class CustomModelConfig(Schema):
    """A model of your own: `factory` names a callable `(shape, classes) -> torch.nn.Module`."""

    channels_last: ClassVar[bool] = False
    fused_batch: ClassVar[int] = 0
    name: Literal["custom"] = "custom"
    factory: str
    """`module:function`; it gets the image shape (C, H, W), the number of classes and `options`."""
    init: Initialisation = "default"
    """`default`: whatever the factory leaves; `uniform`: U(−0.5, 0.5) on every parameter."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments handed to the factory."""

    def module(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Call the user's factory."""
        module = load_attribute(self.factory)(shape, classes, **self.options)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model.factory: {self.factory} returned {type(module).__name__}, not a Module")
        return module


ModelConfig = Annotated[
    LeNetConfig | LeNet4Config | ConvNet64Config | MLPConfig | CustomModelConfig, Field(discriminator="name")
]


def _lenet(shape: tuple[int, int, int], classes: int, strides: tuple[int, ...]) -> nn.Module:
    channels, height, width = shape
    body: list[nn.Module] = []
    for stride in strides:
        body += [nn.Conv2d(channels, 12, 5, stride=stride, padding=2), nn.Sigmoid()]
        channels, height, width = 12, -(-height // stride), -(-width // stride)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(*body))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(12 * height * width, classes))
    return model


class ConvNet64(nn.Module):
    """Eight 3×3 convolutions with batch norm and ReLU, two 3×3 poolings, one linear layer."""

    WIDTHS = (64, 128, 128, 256, 256, 256, 256, 256)

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        """Build for images of `shape` (C, H, W)."""
        super().__init__()
        channels, height, width = shape
        for index, wide in enumerate(self.WIDTHS):
            self.add_module(f"conv{index}", nn.Conv2d(channels, wide, 3, padding=1))
            self.add_module(f"bn{index}", batch_norm.FederatedBatchNorm2d(wide))
            channels = wide
        self.pool = nn.MaxPool2d(3)
        self.linear = nn.Linear(channels * (height // 9) * (width // 9), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        for index in range(len(self.WIDTHS)):
            x = torch.relu(self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(x)))
            if index in (5, 7):
                x = self.pool(x)
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class Model:
    """A module seen as a pure function of its flat weights.

    Attributes:
        module: The network itself; its own parameters hold whatever was last loaded.
        layout: Where each parameter lies in a flat vector of length d.
        shape: Shape (C, H, W) of one image, values in [0, 1].
        classes: Number of classes.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
        """Wrap `module`, replacing its batch norm by the federated one (see `batch_norm`)."""
        self.module = batch_norm.replace_batch_norm(module)
        self.layout = ParameterLayout.of(self.module)
        self.shape, self.classes = shape, classes
        self.has_batch_norm = any(True for _ in batch_norm.layers(self.module))

    @property
    def first_linear(self) -> str:
        """Name of the first fully connected layer, the one PLD defends; ConfigError if there is none."""
        for name, child in self.module.named_modules():
            if isinstance(child, nn.Linear):
                return str(name)
        raise ConfigError("the model has no fully connected layer")

    def initial_weights(self) -> Tensor:
        """Return the weights that the module holds now, flat: [d]."""
        return self.layout.flatten(p.detach() for p in self.module.parameters()).clone()

    def logits(self, weights: Tensor, images: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, C, H, W] at flat weights [d]; differentiable in both."""
        result: Tensor = functional_call(self.module, self.layout.views(weights), (images,))
        return result

    def logits_and_statistics(self, weights: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `logits`, with the batch-norm statistics [b] that this batch showed."""
        logits = self.logits(weights, images)
        return logits, batch_norm.collect_statistics(batch_norm.layers(self.module), logits)

    def statistics(self, weights: Tensor, images: Tensor) -> Tensor:
        """Return means and variances [b] of what enters the batch-norm layers; differentiable in `images`.

        Unlike those of `logits_and_statistics` they are there in eval mode as well.
        """
        found: dict[nn.Module, Tensor] = {}

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
            found[layer] = torch.cat([mean, variance])

        hooks = [layer.register_forward_pre_hook(note) for layer in batch_norm.layers(self.module)]
        try:
            self.logits(weights, images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([found[layer] for layer in batch_norm.layers(self.module)])

    def representation(self, weights: Tensor, images: Tensor, name: str | None = None) -> Tensor:
        """Return the input of a layer, by default the first fully connected one; differentiable in `images`."""
        captured: list[Tensor] = []
        layer = self.module.get_submodule(name or self.first_linear)
        hook = layer.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            self.logits(weights, images)
        finally:
            hook.remove()
        return captured[0]

    def to(self, device: torch.device | str) -> "Model":
        """Move the module to `device`."""
        self.module.to(device)
        return self


def build_model(config: Any, shape: tuple[int, int, int], classes: int, seed: int) -> Model:
    """Build the configured model, initialised from `seed` alone.

    Raises:
        ConfigError: If the architecture does not fit images of `shape`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_stream(seed, Purpose.INITIAL_WEIGHTS).initial_seed())
        module: nn.Module = config.module(shape, classes)
        if config.init == "uniform":
            _initialise(module, lambda parameter: parameter.uniform_(-0.5, 0.5))
    model = Model(module, shape, classes)
    try:
        with torch.no_grad():
            found = tuple(model.logits(model.initial_weights(), torch.zeros(2, *shape)).shape)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"model {config.name!r} does not take images of shape {shape}: {error}") from error
    if found != (2, classes):
        raise ConfigError(f"model {config.name!r} maps 2 images to shape {found}, not to (2, {classes})")
    return model


def _initialise(module: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            fill(parameter)
