"""What was sent, read from a user's files: safetensors, `torch.save` (tensors only) or NumPy archives.

A payload file holds sections: `weights`, one of `gradient`, `update` (weights after minus weights before) and
`after`, and optionally `statistics`, `labels`, `images` (the truth, for scoring) and `batch_size`. A section is a
mapping by parameter name or a list in the order of the model; in flat files a key is `section.name`. A file
without sections is a plain state dict or list of arrays, as PyTorch and Flower keep them: the weights.
"""

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.learning.batch_norm import FederatedBatchNorm2d
from fedsim.learning.models import Model

Entries = dict[str, Tensor]

SENT = ("gradient", "update", "after")
SECTIONS = ("weights", *SENT, "statistics", "labels", "images", "batch_size")
ALIASES = {"running_mean": "mean", "running_var": "variance"}
"""PyTorch's names of batch norm's averages, and ours."""
NAMES_SHOWN = 3
"""Names of parameters that an error message lists before it only counts."""


@dataclass(frozen=True)
class PayloadFile:
    """The sections of a payload file, each with names or running numbers as keys; what is absent is empty."""

    path: Path
    sections: dict[str, Entries] = field(default_factory=dict)

    def section(self, name: str) -> Entries:
        """Return a section, empty if the file has none of this name."""
        return self.sections.get(name, {})

    def value(self, name: str) -> Tensor | None:
        """Return a section that is one tensor, None if there is none; ConfigError if it is more than that."""
        entries = self.section(name)
        if not entries:
            return None
        if list(entries) != [""]:
            raise ConfigError(f"{self.path}: {name} must be one tensor, found {_some(list(entries))}")
        return entries[""]

    @property
    def kind(self) -> str:
        """Which of `gradient`, `update` and `after` the file holds; ConfigError unless it is exactly one."""
        kinds = [name for name in SENT if self.section(name)]
        if len(kinds) != 1:
            found = " and ".join(kinds) if kinds else _some(list(self.sections))
            raise ConfigError(
                f"{self.path}: holds {found}; a payload needs weights and one of gradient, update and after"
            )
        return kinds[0]


def read_payload(path: Path, after: Path | None = None) -> PayloadFile:
    """Read a payload file, or with `after` the weights of two consecutive rounds.

    Raises:
        ConfigError: If a file cannot be read, holds anything but tensors, or lacks what a payload needs.
    """
    sections = _by_section(read_tensors(path))
    if after is not None:
        if any(sections.get(name) for name in SENT):
            raise ConfigError(
                f"{path}: holds {' and '.join(s for s in SENT if sections.get(s))} already, no --after"
            )
        late = _by_section(read_tensors(after))
        sections["after"] = late["after"] if late.get("after") else late.get("weights", {})
    payload = PayloadFile(path, sections)
    if not payload.section("weights"):
        raise ConfigError(f"{path}: holds {_some(list(sections))}, but no weights")
    _ = payload.kind
    return payload


def read_tensors(path: Path) -> Entries:
    """Read a file as tensors by dotted path.

    Raises:
        ConfigError: If it cannot be read or holds anything but tensors and numbers.
    """
    try:
        data = _load(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{path}: not a file of tensors alone: {reason}") from error
    entries = dict(_leaves(data, "", path))
    if not entries:
        raise ConfigError(f"{path}: holds no tensors")
    return entries


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items() if k == "batch_size"}
                return metadata | {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            # np.savez calls a list's arrays arr_0, arr_1, …
            return {re.sub(r"(^|\.)arr_(\d+)$", r"\1\2", name): arrays[name] for name in arrays.files}
    return torch.load(path, map_location="cpu", weights_only=True)


def _leaves(data: Any, prefix: str, path: Path) -> Iterator[tuple[str, Tensor]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), path)
    elif isinstance(data, list | tuple) and not all(isinstance(item, int | float) for item in data):
        for number, value in enumerate(data):
            yield from _leaves(value, f"{prefix}.{number}" if prefix else str(number), path)
    elif isinstance(data, Tensor | np.ndarray | np.number | int | float | list | tuple):
        yield prefix, torch.as_tensor(data)
    else:
        raise ConfigError(f"{path}: {prefix or 'the file'} is no tensor but {type(data).__name__}")


def _by_section(entries: Entries) -> dict[str, Entries]:
    sections: dict[str, Entries] = {}
    if not any(key.split(".", 1)[0] in SECTIONS for key in entries):
        return {"weights": entries}
    for key, value in entries.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


@dataclass(frozen=True)
class Aligned:
    """Entries in the order of a model: parameters [d], and batch norm's averages [b] where they were given."""

    parameters: Tensor
    averages: Tensor | None


def align(entries: Entries, model: Model, what: str) -> Aligned:
    """Put named or numbered entries into the order of the model.

    Raises:
        ConfigError: If names or shapes are not the model's, both shown, or a value is not finite.
    """
    known = {name: tuple(value.shape) for name, value in model.module.state_dict().items()}
    numbered = all(name.isdigit() for name in entries)
    named = _numbered(entries, model, what) if numbered else _named(entries)
    missing = [name for name in model.layout.names if name not in named]
    strange = [name for name in named if name not in known]
    if missing or strange:
        raise ConfigError(
            f"{what} do not fit the model: there {_some(strange or list(named))}; "
            f"in the model {_some(missing or list(known))}"
        )
    for name, value in named.items():
        if tuple(value.shape) != known[name]:
            raise ConfigError(
                f"{what} do not fit the model: {name} is {list(value.shape)} there, "
                f"{list(known[name])} in the model"
            )
        if not torch.isfinite(value).all():
            raise ConfigError(f"{what} hold values that are not finite, the first in {name}")
    parameters = model.layout.flatten(named[name].float() for name in model.layout.names)
    buffers = [name for layer, _ in _norms(model) for name in (f"{layer}.mean", f"{layer}.variance")]
    if not buffers or any(name not in named for name in buffers):
        return Aligned(parameters, None)
    return Aligned(parameters, torch.cat([named[name].float() for name in buffers]))


def _norms(model: Model) -> list[tuple[str, FederatedBatchNorm2d]]:
    return [(n, m) for n, m in model.module.named_modules() if isinstance(m, FederatedBatchNorm2d)]


def _named(entries: Entries) -> Entries:
    # DataParallel and DistributedDataParallel put `module.` before every name.
    wrapped = all(name.startswith("module.") for name in entries)
    named: Entries = {}
    for name, value in entries.items():
        stem, _, last = (name.removeprefix("module.") if wrapped else name).rpartition(".")
        if last != "num_batches_tracked":
            last = ALIASES.get(last, last)
            named[f"{stem}.{last}" if stem else last] = value
    return named


def _numbered(entries: Entries, model: Model, what: str) -> Entries:
    """Name a list: parameters alone, or a state dict's values with batch norm's buffers among them."""
    arrays = [entries[key] for key in sorted(entries, key=int)]
    state = list(model.module.state_dict())
    counted = [f"{layer}.variance" for layer, _ in _norms(model)]
    tracked = [n for name in state for n in ([name, f"{name}:tracked"] if name in counted else [name])]
    for names in (list(model.layout.names), state, tracked):
        if len(names) == len(arrays):
            return {n: v for n, v in zip(names, arrays, strict=True) if not n.endswith(":tracked")}
    raise ConfigError(
        f"{what} do not fit the model: {len(arrays)} arrays there, "
        f"{len(model.layout.names)} parameters in the model"
    )


def batch_statistics(before: Tensor, after: Tensor, model: Model, batch_size: int, momentum: float) -> Tensor:
    """Return the batch's means and variances [b] that moved batch norm's averages [b] once.

    PyTorch moves them by after = (1 − momentum)·before + momentum·batch, with the unbiased variance.
    """
    seen = (after - (1 - momentum) * before) / momentum
    parts, start = [], 0
    for layer, count in _values_per_channel(model, batch_size):
        mean, unbiased = seen[start : start + 2 * layer.channels].chunk(2)
        parts += [mean, unbiased * ((count - 1) / count)]
        start += 2 * layer.channels
    return torch.cat(parts)


@torch.no_grad()
def _values_per_channel(model: Model, batch_size: int) -> list[tuple[FederatedBatchNorm2d, int]]:
    counts: dict[str, int] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, inputs, name=name: counts.update({name: inputs[0].numel() // module.channels})
        )
        for name, layer in _norms(model)
    ]
    model.logits(model.initial_weights(), torch.zeros(batch_size, *model.shape))
    for hook in hooks:
        hook.remove()
    return [(layer, counts[name]) for name, layer in _norms(model)]


def truth_images(images: Tensor, shape: tuple[int, int, int], low: float, high: float, what: str) -> Tensor:
    """Return the private images [B, C, H, W] in [0, 1].

    Args:
        images: As the user gave them: bytes, or values between `low` and `high`; one image needs no batch axis.
        shape: Shape (C, H, W) of an image.
        low: Value of the darkest pixel.
        high: Value of the brightest.
        what: Names the source in errors.

    Raises:
        ConfigError: If the shape is another or values lie outside.
    """
    if math.prod(images.shape[-3:]) == 0 or tuple(images.shape[-3:]) != shape or images.ndim not in (3, 4):
        raise ConfigError(f"{what}: images are {list(images.shape)}, expected [B, {', '.join(map(str, shape))}]")
    if images.dtype == torch.uint8:
        return images.reshape(-1, *shape).float() / 255
    scaled = (images.reshape(-1, *shape).float() - low) / (high - low)
    if not torch.isfinite(scaled).all() or float(scaled.min()) < -1e-3 or float(scaled.max()) > 1 + 1e-3:
        raise ConfigError(f"{what}: images have values outside the range {low:g} to {high:g}; set range")
    return scaled


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown
