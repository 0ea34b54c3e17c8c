"""Which trials there are: points from a grid, a random generator or Optuna, and a ledger that outlasts it all."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.search import Searcher

from fedsim.errors import ConfigError
from fedsim.randomness import Purpose, numpy_stream
from fedsim.sweep import space as spaces
from fedsim.sweep.outcome import Outcome
from fedsim.sweep.plan import SweepPlan, Trial

if TYPE_CHECKING:
    import optuna

Values = list[float] | None
"""The objectives of a point in the sweep's order, or None if it has none."""


class Source(Protocol):
    """Where points come from."""

    def ask(self, point: int) -> spaces.Point | None:
        """Return the point of this number, None after the last."""

    def again(self, point: int, draws: dict[str, Any]) -> None:
        """Take note of a point that was asked for before an interruption, by the draws that made it."""

    def drawn(self, point: int) -> dict[str, Any]:
        """Return the draws that made a point, as JSON holds them."""

    def tell(self, point: int, values: Values) -> None:
        """Learn what a point came to."""


class GridSource:
    """Every point of a grid, in order."""

    def __init__(self, plan: SweepPlan) -> None:
        """Take the grid of `plan`."""
        self._points = list(plan.grid())

    def ask(self, point: int) -> spaces.Point | None:
        """See `Source.ask`."""
        return self._points[point] if point < len(self._points) else None

    def again(self, point: int, draws: dict[str, Any]) -> None:
        """See `Source.again`: a grid remembers by itself."""

    def drawn(self, point: int) -> dict[str, Any]:
        """See `Source.drawn`."""
        return {}

    def tell(self, point: int, values: Values) -> None:
        """See `Source.tell`: a grid does not learn."""


class RandomSource(GridSource):
    """Independent draws: point i is a function of the seed and i."""

    def __init__(self, plan: SweepPlan, seed: int) -> None:
        """Draw from the space of `plan`."""
        self._space, self._seed = plan.space, seed

    def ask(self, point: int) -> spaces.Point | None:
        """See `Source.ask`."""
        drawn: spaces.Point = spaces.draw(self._space, _RandomDraws(self._seed, point))
        return drawn


class _RandomDraws:
    """Draws of one point from the sweep's random stream."""

    def __init__(self, seed: int, point: int) -> None:
        self._rng = numpy_stream(seed, Purpose.SWEEP, point)

    def pick(self, name: str, count: int) -> int:
        return int(self._rng.integers(count))

    def number(self, name: str, among: spaces.Range) -> float:
        if among.step:
            return among.low + among.step * int(self._rng.integers(spaces.steps(among) + 1))
        if among.log:
            return float(among.low * (among.high / among.low) ** self._rng.random())
        return float(self._rng.uniform(among.low, among.high))


class OptunaSource:
    """Points that Optuna suggests; after an interruption it is told all that is known, in the order of old."""

    def __init__(self, plan: SweepPlan, seed: int, startup: int) -> None:
        """Start a study of the space and the objectives of `plan`."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = ["maximize" if mode == "max" else "minimize" for mode in plan.config.objectives.values()]
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        self._study = optuna.create_study(directions=directions, sampler=sampler)
        self._space, self._seed = plan.space, seed
        self._trials: dict[int, optuna.Trial] = {}

    def ask(self, point: int) -> spaces.Point | None:
        """See `Source.ask`."""
        trial = self._trials[point] = self._study.ask()
        drawn: spaces.Point = spaces.draw(self._space, _OptunaDraws(trial))
        return drawn

    def again(self, point: int, draws: dict[str, Any]) -> None:
        """See `Source.again`."""
        self._study.enqueue_trial(draws)
        self.ask(point)

    def drawn(self, point: int) -> dict[str, Any]:
        """See `Source.drawn`."""
        return dict(self._trials[point].params)

    def tell(self, point: int, values: Values) -> None:
        """See `Source.tell`."""
        from optuna.trial import TrialState

        trial = self._trials.pop(point)
        if values is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, values)


class _OptunaDraws:
    """Draws of one point from an Optuna trial."""

    def __init__(self, trial: "optuna.Trial") -> None:
        self._trial = trial

    def pick(self, name: str, count: int) -> int:
        return int(self._trial.suggest_categorical(name, list(range(count))))

    def number(self, name: str, among: spaces.Range) -> float:
        if among.step:
            return among.low + among.step * int(self._trial.suggest_int(name, 0, spaces.steps(among)))
        return float(self._trial.suggest_float(name, among.low, among.high, log=among.log))


def make_source(plan: SweepPlan) -> Source:
    """Return the source of points that the sweep names."""
    search = plan.config.search
    if search.name == "optuna":
        return OptunaSource(plan, search.seed, search.startup)
    return RandomSource(plan, search.seed) if search.name == "random" else GridSource(plan)


class Ledger:
    """The trials that were ever started, one JSON line each, and how those ended, one file each."""

    def __init__(self, folder: Path) -> None:
        """Keep the ledger in `folder`, the sweep's."""
        self._path, self.folder = folder / "trials.jsonl", folder

    def trials(self) -> list[tuple[Trial, dict[str, Any]]]:
        """Return all trials with the draws of their points; a line cut short by a crash does not count."""
        found = []
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found.append((Trial(**entry["trial"]), entry["draws"]))
        return found

    def add(self, trial: Trial, draws: Mapping[str, Any]) -> None:
        """Write a trial down before it starts."""
        entry = {"trial": vars(trial), "draws": draws}
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        cut_short = bool(text) and not text.endswith("\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_short + json.dumps(entry) + "\n")

    def trial_folder(self, trial: Trial) -> Path:
        """Return where a trial keeps its files."""
        return self.folder / "trials" / trial.title


class TrialQueue(Searcher):  # type: ignore[misc]
    """Gives Tune the trials one by one, and tells the source what a point came to over its seeds."""

    def __init__(self, plan: SweepPlan, ledger: Ledger, ended: Sequence[Outcome]) -> None:
        """Go on where the ledger ends.

        Args:
            plan: The sweep.
            ledger: The trials so far.
            ended: How trials ended that need not run again.
        """
        super().__init__()
        self._plan, self._ledger, self._source = plan, ledger, make_source(plan)
        self.by_tune_id: dict[str, Trial] = {}
        self._results: dict[int, dict[int, Values]] = {}
        self._next_point, self._started = 0, time.monotonic()
        known = ledger.trials()
        self._number = len(known)
        over = {outcome.trial.number for outcome in ended}
        self._waiting = [trial for trial, _ in known if trial.number not in over]
        for trial, draws in known:
            if trial.point == self._next_point:
                self._source.again(trial.point, draws)
                self._next_point += 1
        self._complete_last(known)
        for outcome in ended:
            self.finish(outcome.trial, self.values(outcome.metrics))

    def _complete_last(self, known: list[tuple[Trial, dict[str, Any]]]) -> None:
        """Queue the seeds of the last point that an interruption kept from the ledger."""
        if known:
            last, draws = known[-1]
            done = sum(trial.point == last.point for trial, _ in known)
            self._add(last.point, last.values, draws, self._plan.config.seeds[done:])

    def _add(self, point: int, values: spaces.Point, draws: dict[str, Any], seeds: tuple[int, ...]) -> None:
        for seed in seeds:
            trial = Trial(self._number, point, seed, values)
            self._ledger.add(trial, draws)
            self._waiting.append(trial)
            self._number += 1

    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial, or FINISHED."""
        if not self._waiting:
            self._ask()
        if not self._waiting:
            return Searcher.FINISHED
        trial = self.by_tune_id[trial_id] = self._waiting.pop(0)
        return {"trial": trial.number, "point": trial.point, "seed": trial.seed, "values": trial.values}

    def _ask(self) -> None:
        hours, points = self._plan.config.budget.hours, self._plan.points
        over = hours is not None and time.monotonic() - self._started > 3600 * hours
        if over or (points is not None and self._next_point >= points):
            return
        values = self._source.ask(self._next_point)
        if values is not None:
            seeds = self._plan.config.seeds
            self._add(self._next_point, values, self._source.drawn(self._next_point), seeds)
            self._next_point += 1

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note how a trial ended."""
        self.finish(self.by_tune_id[trial_id], self.values(result or {}))

    def values(self, metrics: Mapping[str, Any]) -> Values:
        """Return the objectives among a trial's metrics, None if one is missing."""
        found = [metrics.get(name) for name in self._plan.config.objectives]
        return (
            None
            if "failure" in metrics or None in found
            else [float(value) for value in found if value is not None]
        )

    def finish(self, trial: Trial, values: Values) -> None:
        """Tell the source the mean over the seeds, once they are all there; a failed seed fails the point."""
        by_seed = self._results.setdefault(trial.point, {})
        by_seed[trial.seed] = values
        if len(by_seed) < len(self._plan.config.seeds):
            return
        found = [one for one in by_seed.values() if one is not None]
        complete = len(found) == len(by_seed)
        mean = [sum(column) / len(column) for column in zip(*found, strict=True)] if complete else None
        self._source.tell(trial.point, mean)
        del self._results[trial.point]

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a sweep is resumed from its ledger.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("a sweep is resumed by `fedsim sweep --resume`, not by Tune")
