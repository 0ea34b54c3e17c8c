"""Small models and contexts that the tests of defenses share."""

import numpy as np
import torch
from torch import nn

from fedsim.defenses.base import ClientBatch, ClientContext, PublicContext
from fedsim.learning.batch_norm import FederatedBatchNorm2d
from fedsim.learning.models import LeNetConfig, Model, build_model
from fedsim.randomness import Purpose, torch_stream

TINY = (1, 3, 3)


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return build().double()


def tiny_model(batch_norm=False, classes=3):
    """Conv, perhaps batch norm, sigmoid, linear: 2·4 + 2 (+ 4) + 8·classes + classes parameters, double."""

    def build():
        norm = [FederatedBatchNorm2d(2)] if batch_norm else []
        return nn.Sequential(nn.Conv2d(1, 2, 2), *norm, nn.Sigmoid(), nn.Flatten(), nn.Linear(8, classes))

    return Model(seeded(build), TINY, classes)


def lenet(init="default"):
    return build_model(LeNetConfig(init=init), (1, 28, 28), 10, seed=0)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).random(shape)).to(dtype)


def labels(*shape, classes=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, classes, shape))


def generators(clients, seed=0):
    return [torch_stream(seed, Purpose.PROTECTION, 0, client) for client in clients]


def batch_group(model, rows, size, seed=0):
    dtype = next(model.module.parameters()).dtype
    images = torch.stack([draw(size, *model.shape, seed=seed + row, dtype=dtype) for row in rows])
    targets = torch.stack([labels(size, classes=model.classes, seed=seed + row) for row in rows])
    return ClientBatch(torch.tensor(rows), images, targets)


def client_context(model, clients=range(4), size=5, public=None, groups=None, seed=0):
    """Contexts of the given client numbers: the same client has the same batch and stream in any chunk."""
    if groups is None:
        chunk = batch_group(model, list(clients), size, seed)
        groups = [ClientBatch(torch.arange(len(chunk.rows)), chunk.images, chunk.labels)]
    weights = model.initial_weights()
    return ClientContext(model, weights, groups, generators(clients, seed), public or {})


def public_context(model, size=6, seed=0):
    dtype = next(model.module.parameters()).dtype
    return PublicContext(
        model,
        model.initial_weights(),
        draw(size, *model.shape, seed=seed, dtype=dtype),
        labels(size, classes=model.classes, seed=seed),
        torch_stream(seed, Purpose.PREPARATION),
    )
