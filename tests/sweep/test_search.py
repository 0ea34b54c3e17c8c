import json
from pathlib import Path
from typing import Any

import pytest

from fedsim.sweep.outcome import Outcome
from fedsim.sweep.plan import SweepPlan, Trial
from fedsim.sweep.search import Ledger, TrialQueue
from tests.sweep.sweeps import sweep

SPACE = {
    "defense": {
        "choice": [{"name": "none"}, {"name": "dp_gaussian", "sigma": {"loguniform": [0.001, 1]}}],
    },
    "federation.learning_rate": {"quniform": [0.1, 0.5, 0.1]},
    "federation.clients_per_round": {"randint": [2, 4]},
}


def started(queue: TrialQueue, count: int) -> list[dict[str, Any]]:
    """The configs of the next trials."""
    return [queue.suggest(f"tune{queue._number}-{index}") for index in range(count)]


def score(values: dict[str, Any], seed: int) -> dict[str, float]:
    return {
        "ACC": values["federation.learning_rate"] + seed,
        "PSNR": float(values["federation.clients_per_round"]),
    }


def run_all(plan: SweepPlan, folder: Path, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Run the trials one after another with a made-up score; return the configs, the unfinished one's too."""
    ledger = Ledger(folder)
    known = [Outcome.load(trial, ledger.trial_folder(trial)) for trial, _ in ledger.trials()]
    queue, configs = TrialQueue(plan, ledger, [one for one in known if one]), []
    while (config := queue.suggest(str(len(configs)))) != TrialQueue.FINISHED:
        configs.append(config)
        if len(configs) == stop_after:
            break
        trial = queue.by_tune_id[str(len(configs) - 1)]
        metrics = score(config["values"], config["seed"])
        Outcome(trial, "done", metrics).save(ledger.trial_folder(trial))
        queue.on_trial_complete(str(len(configs) - 1), metrics)
    return configs


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_an_interrupted_search_goes_on_as_if_nothing_had_been(search: str, tmp_path: Path) -> None:
    """Every trial once, the unfinished one again, and the very points of a search that was left in peace."""
    settings = {"search": {"name": search, "seed": 5}, "budget": {"trials": 16}, "seeds": [0, 1]}
    if search == "optuna":
        settings["search"]["startup"] = 3
    plan = sweep(SPACE, objectives={"ACC": "max", "PSNR": "min"}, **settings)
    whole = run_all(plan, _folder(tmp_path / "whole"))
    assert [config["trial"] for config in whole] == list(range(16))
    folder = _folder(tmp_path / "broken")
    first = run_all(plan, folder, stop_after=4)
    rest = run_all(plan, folder)
    assert first[:3] + rest == whole if search == "random" else len(first[:3] + rest) == 16
    assert [config["trial"] for config in rest] == list(range(3, 16))
    assert first[3] == rest[0]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_optuna_stays_within_its_ranges_and_learns(tmp_path: Path) -> None:
    search = {"name": "optuna", "seed": 1, "startup": 5}
    plan = sweep(SPACE, search=search, budget={"trials": 40}, objectives={"ACC": "max"})
    configs = run_all(plan, tmp_path)
    rates = [config["values"]["federation.learning_rate"] for config in configs]
    assert all(min(abs(rate - step / 10) for step in range(1, 6)) < 1e-9 for rate in rates)
    assert {config["values"]["federation.clients_per_round"] for config in configs} <= {2, 3, 4}
    assert sum(rates[20:]) > sum(rates[:20])


def test_seeds_of_the_last_point_are_completed_after_a_crash_between_them(tmp_path: Path) -> None:
    plan = sweep({"federation.clients": {"grid": [6, 8]}}, seeds=[0, 1, 2])
    started(TrialQueue(plan, Ledger(tmp_path), []), 1)
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    (tmp_path / "trials.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    configs = started(TrialQueue(plan, Ledger(tmp_path), []), 6)
    assert [(c["trial"], c["point"], c["seed"]) for c in configs] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 0, 2),
        (3, 1, 0),
        (4, 1, 1),
        (5, 1, 2),
    ]
    assert len(Ledger(tmp_path).trials()) == 6


def test_hours_that_are_over_start_nothing(tmp_path: Path) -> None:
    plan = sweep(SPACE, search={"name": "random"}, budget={"hours": 1e-12})
    assert TrialQueue(plan, Ledger(tmp_path), []).suggest("a") == TrialQueue.FINISHED


def test_a_point_with_a_failed_seed_is_a_failure(tmp_path: Path) -> None:
    plan = sweep({"federation.clients": {"grid": [6]}}, seeds=[0, 1])
    queue = TrialQueue(plan, Ledger(tmp_path), [])
    told: list[Any] = []
    queue._source.tell = lambda point, values: told.append((point, values))  # type: ignore[method-assign]
    started(queue, 2)
    for index, result in enumerate([{"ACC": 0.5}, {"failure": "diverged"}]):
        queue.finish(Trial(index, 0, index, {}), queue.values(result))
    assert told == [(0, None)]


def test_the_ledger_is_plain_json(tmp_path: Path) -> None:
    plan = sweep({"federation.clients": {"grid": [6]}})
    started(TrialQueue(plan, Ledger(tmp_path), []), 1)
    (line,) = (tmp_path / "trials.jsonl").read_text().splitlines()
    expected = {"number": 0, "point": 0, "seed": 0, "values": {"federation.clients": 6}}
    assert json.loads(line) == {"trial": expected, "draws": {}}
