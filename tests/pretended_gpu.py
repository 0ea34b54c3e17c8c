"""Tensors that say they are on a GPU, on machines that have none: what mixes them with others is noted.

Nothing moves: a tensor that was sent to "cuda", or comes of one that was, says that it is there, and the CPU does
the work. What functorch wraps inside of `vmap` and `grad` says nothing and is not judged.
"""

import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda")
FACTORIES = frozenset(
    "zeros ones full empty arange tensor eye rand randn randint linspace from_numpy as_tensor randperm".split()
)
INDIFFERENT = frozenset(
    ["to", "copy_", "cpu", "__getitem__", "__setitem__", "__set__", "_has_compatible_shallow_copy_type"]
)
"""What takes tensors of two devices: moves, indices, and a module's change of device."""


class PretendedGPU(TorchFunctionMode):
    """Use it as a context manager.

    Attributes:
        mixed: Where tensors of two devices met, or one on the GPU was taken for an array.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs, args = getattr(func, "__name__", str(func)), dict(kwargs or {}), list(args)
        if name == "__get__":
            return self._attribute(func, args[0])
        tensors = list(_tensors((args, kwargs)))
        places = {_place(tensor) for tensor in tensors if tensor.ndim}
        if name not in INDIFFERENT and {"cuda", "cpu"} <= places or (name == "numpy" and "cuda" in places):
            self.mixed.add(f"{name} in {_caller()}")
        place = "cuda" if "cuda" in {_place(tensor) for tensor in tensors} else None
        if name == "cpu":
            place = "cpu"
        elif name == "to":
            place = self._target(args, kwargs) or place
        elif kwargs.get("device") is not None:
            place, kwargs["device"] = torch.device(kwargs["device"]).type, "cpu"
        elif name in FACTORIES and not tensors:
            place = "cpu"
        out = func(*args, **kwargs)
        if name in ("to", "cpu") and out is args[0] and _place(out) != place:
            out = out.clone()
        return _put(out, place)

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "device" and _place(tensor) == "cuda":
            return GPU
        return _put(func(tensor), _place(tensor))

    def _target(self, args: list[Any], kwargs: dict[str, Any]) -> str | None:
        """Return where `to` moves a tensor, and let it stay."""
        target = kwargs.get("device", args[1] if len(args) > 1 else None)
        if isinstance(target, Tensor):
            return _place(target)
        if not isinstance(target, str | torch.device):
            return None
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        else:
            args[1] = torch.device("cpu")
        return torch.device(target).type


def _place(tensor: Tensor) -> str | None:
    place: str | None = tensor.__dict__.get("pretended_place")
    return place


def _put(out: Any, place: str | None) -> Any:
    for tensor in _tensors(out) if place else ():
        tensor.pretended_place = place  # type: ignore[attr-defined]
    return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/fedsim/" in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a test"
