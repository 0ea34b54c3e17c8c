"""Functions of tensors that a GPU repeats as one CUDA graph.

The networks that are attacked are small: launching their kernels one by one takes a GPU's host longer than the GPU
needs to run them. A graph launches all of them at once.

Source: NVIDIA, "CUDA C++ Programming Guide", chapter on CUDA graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3
"""Calls with the same shapes before they are recorded: libraries choose their kernels in the first."""
GRAPHS = 2
"""Graphs kept of one function: each holds the memory that the function works in. Chunks come in two sizes."""

Function = Callable[..., tuple[Tensor, ...]]
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass
class _Recording:
    """Calls with the same shapes: how many there were, and the graph, once there is one."""

    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()


class Replayed:
    """Calls a function of tensors; on a GPU, once it was called often with the same shapes, as a graph.

    The function must do the same every time: launch the same kernels, and read nothing else that may lie elsewhere
    next time. One that waits for the GPU cannot be recorded and is called as it is.
    """

    def __init__(self, function: Function) -> None:
        """Call `function`, which takes tensors of one device and returns a tuple of them."""
        self.function = function
        self._recordings: dict[Shapes, _Recording] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the function returns, in memory of its own."""
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        # Put last, so that the first is the one whose last use is the longest ago.
        recording = self._recordings[shapes] = self._recordings.pop(shapes, _Recording())
        recording.calls += 1
        if recording.calls == WARM_UP + 1:
            self._record(recording, inputs)
        if recording.graph is None:
            return self.function(*inputs)
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.graph.replay()
        return tuple(output.clone() for output in recording.outputs)

    def _record(self, recording: _Recording, inputs: tuple[Tensor, ...]) -> None:
        recorded = [shapes for shapes, other in self._recordings.items() if other.graph]
        for shapes in recorded[: max(0, len(recorded) + 1 - GRAPHS)]:
            del self._recordings[shapes]
        graph, own = torch.cuda.CUDAGraph(), tuple(tensor.detach().clone() for tensor in inputs)
        try:
            with torch.cuda.graph(graph):
                recording.outputs = self.function(*own)
        except RuntimeError:
            recording.outputs = ()
            return
        recording.graph, recording.inputs = graph, own
