"""Batch norm for federations: which statistics normalise, and whose statistics the server keeps.

The choices, made on purpose because published code leaves them to chance:

* Local training and every gradient an attack sees use the statistics of the batch at hand (train mode).
* A client reports the mean and variance that each layer saw, weighted like its update; the server keeps an
  exponential average of them. Those *statistics* `[b]` travel beside the update, are never protected by a
  defense, and are part of what an honest-but-curious server observes.
* Evaluation normalises with the server's averages.

No buffer is mutated in a forward pass, so the layers work under `torch.func` transforms as they are.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class FederatedBatchNorm2d(nn.Module):
    """Batch norm over [B, C, H, W] that reports its batch statistics instead of updating buffers in place."""

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        """Start as the identity up to normalisation: weight 1, bias 0, averages 0 and 1."""
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the batch in train mode (and note its statistics), by the averages in eval mode."""
        if self.training:
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            self.seen = torch.cat([mean, variance])
        else:
            mean, variance = self.mean, self.variance
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def layers(module: nn.Module) -> Iterator[FederatedBatchNorm2d]:
    """Yield the batch-norm layers of `module` in module order."""
    for child in module.modules():
        if isinstance(child, FederatedBatchNorm2d):
            yield child


def replace_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm2d` inside `module` by a federated one, keeping weight, bias and averages."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _converted(child))
        else:
            replace_batch_norm(child)
    return module


def _converted(layer: nn.BatchNorm2d) -> FederatedBatchNorm2d:
    new = FederatedBatchNorm2d(layer.num_features, layer.eps)
    with torch.no_grad():
        if layer.affine:
            new.weight.copy_(layer.weight)
            new.bias.copy_(layer.bias)
        if layer.running_mean is not None and layer.running_var is not None:
            new.mean.copy_(layer.running_mean)
            new.variance.copy_(layer.running_var)
    return new


def collect_statistics(of: Iterable[FederatedBatchNorm2d], like: Tensor) -> Tensor:
    """Return what some layers saw in the last train-mode forward pass: [b], means and variances by layer."""
    seen = [layer.seen for layer in of if layer.seen is not None]
    return torch.cat(seen) if seen else like.new_zeros(0)


def averages(module: nn.Module) -> Tensor:
    """Return the server's averages held in the layers: [b], in the order of `collect_statistics`."""
    parts = [torch.cat([layer.mean, layer.variance]) for layer in layers(module)]
    return torch.cat(parts) if parts else torch.zeros(0)


def load_averages(module: nn.Module, statistics: Tensor) -> None:
    """Write averages `[b]` into the layers, for evaluation."""
    start = 0
    for layer in layers(module):
        middle, end = start + layer.channels, start + 2 * layer.channels
        layer.mean.copy_(statistics[start:middle])
        layer.variance.copy_(statistics[middle:end])
        start = end
