"""How an attacker gets the labels behind a gradient: they are given, or follow from the last layer's gradient."""

import torch
from torch import Tensor, nn

from fedsim.attacks.base import LabelSource
from fedsim.errors import ConfigError
from fedsim.learning.models import Model
from fedsim.privacy.observation import Observation
from fedsim.randomness import Purpose, torch_stream


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
    one_image(observation.batch_size)
    return _by_class(observation)[0].argmin(1, keepdim=True)


def labels_from(source: LabelSource, observation: Observation, attack: str) -> Tensor:
    """Return the labels [N, B], given or recovered; see `known_labels` and `recover_labels`."""
    return known_labels(observation, attack) if source == "known" else recover_labels(observation)


def one_image(batch_size: int) -> None:
    """See that gradients come from one image each; ConfigError if not."""
    if batch_size != 1:
        raise ConfigError(
            "idlg finds the label of a single image, but each gradient comes from "
            f"{batch_size}: set audit.batch_size to 1, or use dlg or gia"
        )


DUMMIES = 64
"""Random images by which the attacker estimates what the model answers to the victims' images."""


def recover_labels(observation: Observation) -> Tensor:
    """Recover the labels behind gradients of one image or more, [N, B], in ascending order.

    Raises:
        ConfigError: If the model does not end in a linear layer.
    """
    return sign_rule(observation) if observation.batch_size == 1 else label_counts(observation)


@torch.no_grad()
def label_counts(observation: Observation) -> Tensor:
    """Recover how often each class occurs in batches, as labels [N, B] in ascending order.

    Class c's entry of the last bias gradient is mean(p_c) − n_c/B, hence n_c = B·(mean(p_c) − entry). Without a
    bias a row of the weight gradient, summed, is about the same times the mean sum of the layer's inputs.
    Both means are taken over random images, whose answers are close to the victims' while a model is little
    trained; the nearest whole numbers that sum to B are returned. Several local steps count as one batch. Where
    the learning rate is unknown one class at least is taken to be absent: its entry is mean(p_c) times the rate,
    the largest multiple of any class.

    Raises:
        ConfigError: If the model does not end in a linear layer.

    Source: Geng et al., "Towards General Deep Leakage in Federated Learning", 2021; Wainakh et al., "User-Level
    Label Leakage from Gradients in Federated Learning", PoPETs 2022.
    """
    model, size = observation.model, observation.batch_size
    entries, biased = _by_class(observation)
    generator = torch_stream(0, Purpose.ATTACK)
    dummies = torch.rand(DUMMIES, *model.shape, generator=generator).to(observation.weights)
    inputs = model.representation(observation.weights, dummies, last_linear(model))
    scale = 1.0 if biased else float(inputs.sum(1).mean())
    answers = model.logits(observation.weights, dummies).softmax(-1).mean(0)
    entries = entries / (scale * observation.local.steps)
    if observation.local.learning_rate is None:
        entries = entries / (entries / answers).amax(1, keepdim=True)
    wanted = size * (answers - entries)
    return torch.stack([_nearest_counts(row, size) for row in wanted])


def _nearest_counts(wanted: Tensor, total: int) -> Tensor:
    """Give `total` labels, one after the other, to the class that lacks most of what is `wanted` [classes]."""
    lacking, labels = wanted.clone(), []
    for _ in range(total):
        label = int(lacking.argmax())
        lacking[label] -= 1
        labels.append(label)
    return torch.tensor(sorted(labels), device=wanted.device)


def _by_class(observation: Observation) -> tuple[Tensor, bool]:
    """Return the last layer's gradient by class, [N, classes], and whether it is that of a bias."""
    views = observation.model.layout.views(observation.gradients)
    name = last_linear(observation.model)
    bias = views.get(f"{name}.bias")
    return (views[f"{name}.weight"].sum(2), False) if bias is None else (bias, True)


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
        raise ConfigError("labels can be recovered only from a model that ends in a fully connected layer")
    return linear[-1][0]


def one_hot(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return labels [N, B] as probabilities [N, B, classes] of the dtype of `like`."""
    return torch.nn.functional.one_hot(labels, classes).to(like)
