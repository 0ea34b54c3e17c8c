"""The search space: settings in which any value may be a distribution, at any depth.

`{grid: [...]}`, `{choice: [...]}`, `{uniform: [low, high]}`, `{loguniform: [low, high]}`, `{quniform: [low, high,
step]}` and `{randint: [low, high]}` (both ends included) are distributions; anything else stands for itself. An
option of a grid or a choice may hold distributions in its turn, so that a defense brings its own parameters:

    defense: {grid: [{name: none}, {name: gc, prune: {grid: [0.5, 0.9]}}, {name: pld, prune: {uniform: [0, 0.5]}}]}
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedsim.errors import ConfigError
from fedsim.schema import suggest

Point = dict[str, Any]
"""A value for each path of the space."""


@dataclass(frozen=True)
class Options:
    """One of several values, each of which may hold distributions."""

    options: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; spaced by `step` from `low` on, if there is one."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False


class Draws(Protocol):
    """Where draws come from: a random generator, or an optimiser that learns."""

    def pick(self, name: str, count: int) -> int:
        """Return one of 0 … count − 1 for the choice `name`."""

    def number(self, name: str, among: Range) -> float:
        """Return a number of the range `name`."""


def parse(value: Any, path: str) -> Any:
    """Return `value` with its distributions as `Options` and `Range`.

    Raises:
        ConfigError: If a distribution is not written as it should be.
    """
    if isinstance(value, list):
        return [parse(item, f"{path}.{index}") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return _leaf(value)
    kind = _kind(value, path)
    if kind is None:
        return {key: parse(item, f"{path}.{key}") for key, item in value.items()}
    given = value[kind]
    if not isinstance(given, list) or not given:
        raise ConfigError(f"space: {path}: {kind} needs a list, got {given!r}")
    if kind in ("grid", "choice"):
        return Options(tuple(parse(item, path) for item in given))
    return _range(kind, given, path)


def _leaf(value: Any) -> Any:
    """Return `value`; `1e-4`, which YAML 1.1 takes for text, as the number that it is meant to be."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_KINDS = ("grid", "choice", "uniform", "loguniform", "quniform", "randint")


def _kind(value: Mapping[str, Any], path: str) -> str | None:
    known = [key for key in value if key in _KINDS]
    if known and len(value) > 1:
        raise ConfigError(f"space: {path}: {known[0]} stands alone, got {', '.join(map(str, value))} together")
    if known:
        return known[0]
    if len(value) == 1:
        key, given = next(iter(value.items()))
        hint = suggest(str(key), _KINDS)
        if isinstance(given, list) and "did you mean" in hint:
            raise ConfigError(f"space: {path}: unknown distribution {hint}")
    return None


def _range(kind: str, given: Sequence[Any], path: str) -> Range:
    wanted = 3 if kind == "quniform" else 2
    given = [_leaf(item) for item in given]
    numbers = [n for n in given if isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)]
    if len(given) != wanted or len(numbers) != wanted:
        form = "[low, high, step]" if wanted == 3 else "[low, high]"
        raise ConfigError(f"space: {path}: {kind} needs {form} of numbers, got {given!r}")
    low, high = numbers[:2]
    if low >= high:
        raise ConfigError(f"space: {path}: {kind} needs low < high, got {low!r} and {high!r}")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"space: {path}: loguniform needs low > 0, got {low!r}")
    if kind == "randint":
        if not all(isinstance(n, int) for n in (low, high)):
            raise ConfigError(f"space: {path}: randint needs whole numbers, got {given!r}")
        return Range(low, high, step=1, integer=True)
    if kind == "quniform" and numbers[2] <= 0:
        raise ConfigError(f"space: {path}: quniform needs step > 0, got {numbers[2]!r}")
    whole = kind == "quniform" and all(isinstance(n, int) for n in numbers)
    return Range(low, high, kind == "loguniform", numbers[2] if kind == "quniform" else None, whole)


def is_grid(node: Any) -> bool:
    """Return whether the space is finite: no range in it."""
    if isinstance(node, Range):
        return False
    return all(is_grid(child) for child in _children(node))


def _children(node: Any) -> Sequence[Any]:
    if isinstance(node, Options):
        return node.options
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else ()


def count(node: Any) -> int:
    """Return the number of values that `enumerate_grid` would yield, without making them."""
    if isinstance(node, Options):
        return sum(count(option) for option in node.options)
    return math.prod(count(child) for child in _children(node))


def enumerate_grid(node: Any) -> Iterator[Any]:
    """Yield every value of a finite space; the last axis varies fastest."""
    if isinstance(node, Options):
        for option in node.options:
            yield from enumerate_grid(option)
    elif isinstance(node, dict):
        for values in itertools.product(*(list(enumerate_grid(child)) for child in node.values())):
            yield dict(zip(node, values, strict=True))
    elif isinstance(node, list):
        for values in itertools.product(*(list(enumerate_grid(child)) for child in node)):
            yield list(values)
    else:
        yield node


def corners(node: Any) -> Iterator[Any]:
    """Yield values that have every option and both ends of every range in them, one changed at a time."""
    if isinstance(node, Range):
        yield from (_number(node, node.low), _number(node, node.high))
    elif isinstance(node, Options):
        for option in node.options:
            yield from corners(option)
    elif isinstance(node, dict):
        first = {key: next(corners(child)) for key, child in node.items()}
        yield first
        for key, child in node.items():
            yield from ({**first, key: corner} for corner in itertools.islice(corners(child), 1, None))
    elif isinstance(node, list):
        for mapping in corners(dict(enumerate(node))):
            yield list(mapping.values())
    else:
        yield node


def draw(node: Any, draws: Draws, name: str = "") -> Any:
    """Return one value of the space; each draw is named by its path and by the options that lead to it."""
    if isinstance(node, Range):
        return _number(node, draws.number(name, node))
    if isinstance(node, Options):
        index = draws.pick(name, len(node.options))
        return draw(node.options[index], draws, f"{name}[{index}]")
    if isinstance(node, dict):
        return {key: draw(child, draws, f"{name}/{key}" if name else str(key)) for key, child in node.items()}
    if isinstance(node, list):
        return [draw(child, draws, f"{name}/{index}") for index, child in enumerate(node)]
    return node


def _number(among: Range, value: float) -> float:
    return round(value) if among.integer else float(value)


def steps(among: Range) -> int:
    """Return how many steps of a stepped range fit between its ends."""
    assert among.step
    return int((among.high - among.low) / among.step + 1e-9)


def lay(settings: Any, path: Sequence[str], value: Any) -> Any:
    """Return `settings` with `value` laid over what stands at `path`.

    As everywhere in a config, mappings merge and another `name` starts a mapping afresh; a whole number in the
    path is an index into a list.

    Raises:
        ConfigError: If the path leads into a list at an index that it does not have.
    """
    if not path:
        if not (isinstance(value, dict) and isinstance(settings, dict)):
            return value
        for key in sorted(value, key=lambda key: key != "name"):
            settings = lay(settings, [key], value[key])
        return settings
    head, rest = path[0], path[1:]
    if isinstance(settings, list):
        if not head.isdigit() or int(head) >= len(settings):
            raise ConfigError(f"space: there is no item {head!r} in a list of {len(settings)}")
        at = int(head)
        return [*settings[:at], lay(settings[at], rest, value), *settings[at + 1 :]]
    mapping = settings if isinstance(settings, dict) else {}
    if head == "name" and not rest and mapping.get("name") != value:
        return {"name": value}
    return {**mapping, head: lay(mapping.get(head), rest, value)}


def lay_point(settings: dict[str, Any], point: Point) -> dict[str, Any]:
    """Return `settings` under a point; whole mappings and names go before what they start afresh."""
    parts = {path: [] if path == "." else path.split(".") for path in point}
    for path in sorted(point, key=lambda path: (len(parts[path]) - (path.endswith(".name")), path)):
        settings = lay(settings, parts[path], point[path])
    return settings
