"""How an attacker gets the labels behind a gradient: they are given, or one follows from a sign."""

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation


def known_labels(observation: Observation, attack: str) -> Tensor:
    """Return the labels that the adversary is assumed to know, [N, B].

    Raises:
        ConfigError: If the adversary of this audit does not know them.
    """
    if observation.labels is None:
        raise ConfigError(f"{attack} needs the labels, which this adversary does not know")
    return observation.labels


def sign_rule(observation: Observation) -> Tensor:
    """Recover the label of gradients of one image, [N, 1].

    The last layer's bias gradient is p − y, negative in the true class alone; without a bias the sum of a
    class's row of the weight gradient has that sign, the layer's inputs being positive. Under a defense the most
    negative class is taken.

    Raises:
        ConfigError: If a gradient comes from several images, or the model does not end in a linear layer.

    Source: Zhao et al., "iDLG: Improved Deep Leakage from Gradients", 2020.
    """
    if observation.batch_size != 1:
        raise ConfigError(
            "idlg finds the label of a single image, but each gradient comes from "
            f"{observation.batch_size}: set audit.batch_size to 1, or use dlg or gia"
        )
    views = observation.model.layout.views(observation.gradients)
    name = last_linear(observation.model)
    bias = views.get(f"{name}.bias")
    by_class = views[f"{name}.weight"].sum(2) if bias is None else bias
    return by_class.argmin(1, keepdim=True)


def last_linear(model: Model) -> str:
    """Return the name of the fully connected layer that gives the logits.

    Raises:
        ConfigError: If there is none.
    """
    linear: list[tuple[str, nn.Linear]] = []
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Linear):
            linear.append((name, module))
    if not linear or linear[-1][1].out_features != model.classes:
        raise ConfigError("idlg needs a model that ends in a fully connected layer")
    return linear[-1][0]


def one_hot(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return labels [N, B] as probabilities [N, B, classes] of the dtype of `like`."""
    return torch.nn.functional.one_hot(labels, classes).to(like)
