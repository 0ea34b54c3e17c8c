"""Which images a client trains on in a round, and how they are taken from the shared data."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


def as_tensor(array: NDArray[Any], device: torch.device | str = "cpu") -> Tensor:
    """Wrap a NumPy array, which may be read-only; nothing in the engine writes into a tensor made by this."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)


@dataclass(frozen=True)
class ImageStore:
    """Images and labels as tensors on the device that trains.

    Attributes:
        images: Raw bytes, shape [N, C, H, W], uint8.
        labels: Class of each, shape [N], int64.
    """

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: NDArray[np.uint8], labels: Indices, device: torch.device | str = "cpu") -> "ImageStore":
        """Wrap arrays, without a copy on a CPU: they may lie read-only in Ray's object store."""
        return cls(as_tensor(images, device), as_tensor(labels, device))

    def take(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return images [*indices.shape, C, H, W] as float32 in [0, 1], and labels [*indices.shape]."""
        at = torch.from_numpy(indices).to(self.images.device).reshape(-1)
        images = self.images.index_select(0, at).float().div_(255.0)
        labels = self.labels.index_select(0, at)
        return images.reshape(*indices.shape, *images.shape[1:]), labels.reshape(indices.shape)


def local_batches(
    indices: Indices, rng: np.random.Generator, batch_size: int, steps: int | None, epochs: int
) -> list[Indices]:
    """Cut a client's data into the batches of one round.

    Args:
        indices: The client's images, shape [n].
        rng: The client's stream for this round.
        batch_size: Images a batch; a client that holds fewer uses all it has.
        steps: Local steps; the data is shuffled anew whenever it has run out. None: whole epochs.
        epochs: Local epochs when `steps` is None; the last batch of an epoch may be smaller.

    Returns:
        One index array a local step.
    """
    if steps is None:
        orders = [rng.permutation(indices) for _ in range(epochs)]
        return [order[at : at + batch_size] for order in orders for at in range(0, len(order), batch_size)]
    size = min(batch_size, len(indices))
    batches: list[Indices] = []
    while len(batches) < steps:
        order = rng.permutation(indices)
        taken = min(len(order) // size, steps - len(batches))
        batches += [order[at : at + size] for at in range(0, taken * size, size)]
    return batches
