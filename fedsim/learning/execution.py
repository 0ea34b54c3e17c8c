"""How the clients of a chunk are trained: which way for which model, batch and device.

The rule looks at these alone, never at a timing, so that the same run always takes the same path;
`benchmarks/local_step.py` measured what it knows.
"""

import sys
from typing import Literal

import torch
from torch import Tensor

from fedsim.learning.batches import ImageStore, Indices
from fedsim.learning.fused import FusedTrainer
from fedsim.learning.models import Model
from fedsim.learning.training import (
    LocalResult,
    LocalTrainer,
    LoopTrainer,
    MemoryFormat,
    Precision,
    VectorizedTrainer,
)

Execution = Literal["loop", "vectorized", "fused"]
VECTORIZED_BATCH = 8
"""Largest local batch at which vectorising over clients beats the loop on a CPU."""
TINY_BATCH = 2
"""Largest local batch at which it beats the fused pass."""


def choose_execution(device: torch.device, batch_size: int, fused_batch: int) -> Execution:
    """Return the fastest execution.

    Args:
        device: Where clients are trained.
        batch_size: Images of a local batch.
        fused_batch: Largest local batch at which the fused pass beats the loop; 0 where it cannot be used.
    """
    if device.type == "cuda" or batch_size <= TINY_BATCH:
        return "vectorized"
    if batch_size <= fused_batch:
        return "fused"
    return "vectorized" if batch_size <= VECTORIZED_BATCH else "loop"


def choose_memory_format(device: torch.device, takes_channels_last: bool) -> MemoryFormat:
    """Return the faster memory format for this device and a model that takes channels-last images or not."""
    return "channels_last" if device.type == "cpu" and takes_channels_last else "contiguous"


def build_trainer(
    model: Model,
    data: ImageStore,
    learning_rate: float,
    execution: Execution,
    memory_format: MemoryFormat = "contiguous",
    precision: Precision = "float32",
) -> LocalTrainer:
    """Return the trainer of the wanted execution; on a GPU it makes do with the memory that there is.

    Args:
        model: The architecture.
        data: The images.
        learning_rate: The clients'.
        execution: How they are trained.
        memory_format: How images and filters lie in memory; `vectorized` leaves them as they are.
        precision: Of the loop's kernels; the others know float32 alone.
    """
    trainer: LocalTrainer
    if execution == "loop":
        trainer = LoopTrainer(model, data, learning_rate, memory_format, precision)
    elif execution == "fused":
        trainer = FusedTrainer(model, data, learning_rate, memory_format)
    else:
        trainer = VectorizedTrainer(model, data, learning_rate)
    return HalvingTrainer(trainer) if data.images.is_cuda else trainer


class HalvingTrainer:
    """Trains a chunk in two halves, and these likewise, when the memory of the device runs out.

    How many clients fitted is remembered, so that memory runs out once and not with each chunk.
    """

    def __init__(self, trainer: LocalTrainer) -> None:
        """Train by `trainer`."""
        self.trainer = trainer
        self._room = sys.maxsize

    def train(self, weights: Tensor, schedules: list[list[Indices]]) -> LocalResult:
        """See `LocalTrainer.train`; a single client that does not fit raises torch.OutOfMemoryError."""
        if len(schedules) <= self._room:
            try:
                return self.trainer.train(weights, schedules)
            except torch.OutOfMemoryError:
                if len(schedules) == 1:
                    raise
            # Outside the except block, where the failed attempt's tensors are no longer held by its traceback.
            torch.cuda.empty_cache()
            self._room = len(schedules) - 1
        middle = len(schedules) // 2
        return LocalResult.join([self.train(weights, half) for half in (schedules[:middle], schedules[middle:])])
