"""The search space of a sweep: settings by dotted path, each with the values that it may take."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedsim.errors import ConfigError
from fedsim.schema import suggest

Settings = dict[str, Any]
Point = dict[str, Any]
"""One choice for every path of a space."""

MOST_POINTS = 10_000
"""A sweep of more points is refused: nobody means to wait for it."""


class Axis(Protocol):
    """The values that one setting may take."""

    def sample(self, rng: np.random.Generator) -> Any:
        """Draw a value."""
        ...

    def corners(self) -> Sequence[Any]:
        """Return values that are all valid only if the whole axis is: each choice, or both ends."""
        ...

    def suggest(self, path: str, trial: Any) -> Any:
        """Let an Optuna trial choose a value."""
        ...


@dataclass(frozen=True)
class Choice:
    """One of a list; an axis of a `grid` is crossed with the others, a `choice` is drawn."""

    values: tuple[Any, ...]
    grid: bool = False

    def sample(self, rng: np.random.Generator) -> Any:
        """See `Axis`."""
        return self.values[rng.integers(len(self.values))]

    def corners(self) -> Sequence[Any]:
        """See `Axis`."""
        return self.values

    def suggest(self, path: str, trial: Any) -> Any:
        """See `Axis`; Optuna takes only plain values, so it chooses the number of one."""
        return self.values[trial.suggest_categorical(path, list(range(len(self.values))))]


@dataclass(frozen=True)
class Interval:
    """A number between two ends, uniform in itself or in its logarithm, or a multiple of a step above `low`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def sample(self, rng: np.random.Generator) -> float:
        """See `Axis`."""
        if self.log:
            return float(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        if self.step is None:
            return float(rng.uniform(self.low, self.high))
        return self._at(int(rng.integers(self._steps + 1)))

    def corners(self) -> Sequence[Any]:
        """See `Axis`."""
        return (self.low, self.high) if self.step is None else (self._at(0), self._at(self._steps))

    def suggest(self, path: str, trial: Any) -> float:
        """See `Axis`."""
        if self.step is not None:
            return self._at(trial.suggest_int(path, 0, self._steps))
        return float(trial.suggest_float(path, self.low, self.high, log=self.log))

    @property
    def _steps(self) -> int:
        assert self.step is not None
        return int((self.high - self.low) / self.step + 1e-9)

    def _at(self, number: int) -> float:
        assert self.step is not None
        value = self.low + number * self.step
        whole = all(float(part).is_integer() for part in (self.low, self.step))
        return int(value) if whole else value


def parse_axis(path: str, text: Any) -> Axis | None:
    """Return the axis that `{grid: […]}`, `{loguniform: [low, high]}`, … describes; None for a constant.

    Raises:
        ConfigError: If it is none of them.
    """
    if not (isinstance(text, Mapping) and len(text) == 1):
        return None
    (kind, values), known = next(iter(text.items())), ("grid", "choice", "uniform", "loguniform", "quniform")
    if kind not in known:
        if isinstance(values, list):
            raise ConfigError(f"space: {path}: unknown kind of axis {suggest(str(kind), known)}")
        return None
    if not isinstance(values, list) or not values:
        raise ConfigError(f"space: {path}: {kind} takes a list of values, got {values!r}")
    if kind in ("grid", "choice"):
        return Choice(tuple(values), grid=kind == "grid")
    return _interval(path, kind, values)


def _interval(path: str, kind: str, values: list[Any]) -> Interval:
    wanted = "[low, high, step]" if kind == "quniform" else "[low, high]"
    try:
        # YAML reads 1e-4 as a text.
        low, high, *rest = (float(v) if isinstance(v, str) else v for v in values)
        good = low < high and len(rest) == (kind == "quniform") and all(step > 0 for step in rest)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ConfigError(f"space: {path}: {kind} takes {wanted} with low < high, got {values!r}")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"space: {path}: loguniform needs low > 0, got {low!r}")
    return Interval(low, high, kind == "loguniform", rest[0] if rest else None)


@dataclass(frozen=True)
class Subspace:
    """Settings that vary together: constants and axes by dotted path."""

    constants: Mapping[str, Any]
    axes: Mapping[str, Axis]

    @classmethod
    def parse(cls, space: Mapping[str, Any]) -> "Subspace":
        """Read a mapping from paths to axes or constants; ConfigError says what is wrong."""
        axes = {path: parse_axis(path, text) for path, text in space.items()}
        constants = {path: space[path] for path, axis in axes.items() if axis is None}
        return cls(constants, {path: axis for path, axis in axes.items() if axis is not None})

    @property
    def grid(self) -> dict[str, Choice]:
        """The axes that are crossed."""
        return {p: axis for p, axis in self.axes.items() if isinstance(axis, Choice) and axis.grid}

    @property
    def combinations(self) -> int:
        """Number of points of the grid axes."""
        return math.prod(len(axis.values) for axis in self.grid.values())

    @property
    def random(self) -> dict[str, Axis]:
        """The axes that are drawn."""
        return {path: axis for path, axis in self.axes.items() if path not in self.grid}

    def points(self, draws: int, rng: np.random.Generator) -> Iterator[Point]:
        """Yield the grid `draws` times with fresh draws of the other axes, or once if there are none."""
        grid = self.grid
        for _ in range(draws if self.random else 1):
            for values in itertools.product(*(axis.values for axis in grid.values())):
                drawn = {path: axis.sample(rng) for path, axis in self.random.items()}
                yield {**self.constants, **dict(zip(grid, values, strict=True)), **drawn}

    def corners(self, grid: bool) -> Iterator[Point]:
        """Yield a point, and it with one axis at a corner: each drawn axis, or those of a grid, too."""
        first = {path: axis.corners()[0] for path, axis in self.axes.items()}
        yield {**self.constants, **first}
        for path, axis in (self.axes if grid else self.random).items():
            for value in axis.corners():
                yield {**self.constants, **first, path: value}

    def suggest(self, trial: Any) -> Point:
        """Let an Optuna trial choose a point."""
        return {**self.constants, **{path: axis.suggest(path, trial) for path, axis in self.axes.items()}}


@dataclass(frozen=True)
class Space:
    """Alternatives of which exactly one holds in a point, each with the common axes: a conditional space."""

    alternatives: tuple[Subspace, ...]

    @classmethod
    def parse(cls, common: Mapping[str, Any], alternatives: Sequence[Mapping[str, Any]]) -> "Space":
        """Read the common axes and those of each alternative.

        Raises:
            ConfigError: If an axis is malformed or the grid has more than `MOST_POINTS` points.
        """
        space = cls(tuple(Subspace.parse({**common, **own}) for own in alternatives or [{}]))
        if space.combinations > MOST_POINTS:
            raise ConfigError(
                f"space: the grid has {space.combinations:,} points; at most {MOST_POINTS:,} (draw some with "
                "choice in place of grid, and budget.trials)"
            )
        return space

    @property
    def combinations(self) -> int:
        """Number of points of the grid, over all alternatives."""
        return sum(part.combinations for part in self.alternatives)

    @property
    def has_random(self) -> bool:
        """Whether some axis is drawn."""
        return any(part.random for part in self.alternatives)

    def points(self, draws: int, seed: int) -> list[Point]:
        """Return the points of a grid or random search, alternative by alternative, without repetitions."""
        rng = np.random.default_rng(seed)
        every = [point for part in self.alternatives for point in part.points(draws, rng)]
        return list({json.dumps(point, sort_keys=True): point for point in every}.values())

    def corners(self, grid: bool) -> Iterator[Point]:
        """Yield points that are all valid only if the space is, as far as one axis at a time can tell.

        Args:
            grid: Vary the axes of the grid, too.
        """
        return itertools.chain.from_iterable(part.corners(grid) for part in self.alternatives)

    def suggest(self, trial: Any) -> Point:
        """Let an Optuna trial choose an alternative and its point."""
        number = 0
        if len(self.alternatives) > 1:
            number = trial.suggest_categorical("alternative", list(range(len(self.alternatives))))
        return self.alternatives[number].suggest(trial)


def lay(settings: Settings, point: Point) -> Settings:
    """Return a copy of nested `settings` with every path of `point` set.

    Numbers in a path are indices of lists. Names are set first, and another name starts its mapping afresh, so
    that the settings of one defense do not stay behind for the next.
    """
    result = deepcopy(settings)
    for path in sorted(point, key=lambda p: (not p.endswith("name"), p.count("."))):
        *parents, last = path.split(".")
        node = _walk(result, parents, path)
        if last == "name" and isinstance(node, dict) and node.get("name") != point[path]:
            node.clear()
        if isinstance(node, list):
            node[_index(node, last, path)] = deepcopy(point[path])
        else:
            node[last] = deepcopy(point[path])
    return result


def _walk(node: Any, parents: Sequence[str], path: str) -> Any:
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, path)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"space: {path}: {part} is a single value, it has no settings in it")
    return node


def _index(items: list[Any], part: str, path: str) -> int:
    if not (part.isdigit() and int(part) < len(items)):
        raise ConfigError(f"space: {path}: {part} is none of the {len(items)} items, counted from 0")
    return int(part)
