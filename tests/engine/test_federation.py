"""Rounds in which not every client delivers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.defenses.base import ClientContext, Defense, ServerContext
from fedsim.engine.checkpoints import CheckpointFolder
from fedsim.engine.dealing import split_evenly
from fedsim.engine.federation import Federation
from fedsim.engine.runtime import Runtime
from fedsim.errors import RunError
from fedsim.learning.batches import ImageStore
from fedsim.preparation import prepare
from fedsim.progress import Reporter
from fedsim.simulation import Simulation
from tests.conftest import small_experiment

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


def custom(name: str, **options: Any) -> dict[str, Any]:
    return {"name": "custom", "factory": f"{__name__}:{name}", "options": options}


class Odd(Defense):
    """Of each chunk's clients the first sends one number too many, the second what is not finite."""

    def protect(self, updates: Tensor, context: ClientContext) -> Sequence[Tensor]:
        rows = list(updates)
        rows[0] = torch.cat([rows[0], rows[0][:1]])
        if len(rows) > 1:
            rows[1] = rows[1] * float("inf")
        return rows


class Spoiling(Defense):
    """A client sends what overflows when it is weighted, or the server makes round 1's aggregate not a number."""

    def __init__(self, who: str) -> None:
        self.who = who

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        return updates + 3e38 * (self.who == "client")

    def compensate(self, aggregate: Tensor, context: ServerContext) -> Tensor:
        return aggregate * float("nan") if (self.who, context.round) == ("server", 1) else aggregate


@pytest.mark.parametrize(
    ("who", "what", "rounds"),
    [
        ("client", "round 0: each client's update is finite, but their sum is not", 0),
        ("server", "round 1: what the defense's compensate returned is not finite", 1),
    ],
)
def test_what_is_not_finite_ends_its_own_round_and_the_weights_before_are_kept(
    who: str, what: str, rounds: int, runtime: Runtime, digits: Dataset, tmp_path: Path
) -> None:
    config = small_experiment(defense=custom("Spoiling", who=who), checkpoint_every=100)
    with pytest.raises(RunError, match=what):
        Simulation(config, dataset=digits, runtime=runtime, output=tmp_path / "run").run()
    kept = CheckpointFolder(tmp_path / "run/checkpoints", config.fingerprint()).latest()
    assert (kept.rounds_done if kept else 0) == rounds
    assert kept is None or all(np.isfinite(array).all() for array in kept.state.values())


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_clients_with_bad_updates_are_counted_named_and_the_weights_renormalised(
    runtime: Runtime, digits: Dataset
) -> None:
    """The round is the mean over those who are left, by their own examples."""
    config = small_experiment(
        federation={"rounds": 1, "learning_rate": 0.3}, defense=custom("Odd"), runtime={"clients_per_chunk": 5}
    )
    prepared = prepare(config, digits)
    spec, model = prepared.spec, prepared.spec.build_model(digits)
    cohort = spec.cohort(0)
    bad = [client for chunk in split_evenly(cohort, 5) for client in chunk[:2]]
    left = [client for client in cohort if client not in bad]
    data = ImageStore.of(digits.train_images, digits.train_labels, "cpu")
    weights = model.initial_weights()
    total, examples = torch.zeros_like(weights), 0
    for client in left:
        (batch,) = spec.schedule(0, client)
        images, labels = data.take(batch)
        loss = lambda w, x=images, y=labels: torch.nn.functional.cross_entropy(model.logits(w, x), y)  # noqa: E731
        total, examples = total + len(batch) * torch.func.grad(loss)(weights), examples + len(batch)
    federation = Federation(spec, digits, runtime)
    record = federation.run_round(0)
    assert np.allclose(federation.weights(), weights - 0.3 * total / examples, atol=1e-6)
    federation.close()
    assert record.clients == len(left) == 5
    wrong = f"shape [{len(weights) + 1}] instead of [{len(weights)}]"
    assert record.rejected == dict(zip(bad, [wrong, "not finite"] * 2, strict=True))

    notes = Notes()
    result = Simulation(config, dataset=digits, runtime=runtime, reporter=notes).run()
    assert result.summary["faults"]["clients_rejected"] == 4
    assert any(f"left out: client {cohort[0]}, {wrong}; client" in line for line in notes.lines)


def test_an_update_of_the_wrong_size_cannot_be_audited_and_the_line_says_whose(
    runtime: Runtime, digits: Dataset
) -> None:
    config = small_experiment(defense=custom("Odd"), attacks=[{"name": "dlg"}], audit={"victims": 1})
    victim = prepare(config, digits).victims[0][0].client
    with pytest.raises(RunError) as caught:
        Simulation(config, dataset=digits, runtime=runtime).run()
    assert str(caught.value).startswith(f"audit: client {victim} sent an update that cannot be attacked: shape")
    assert "\n" not in str(caught.value), "a line, not Ray's traceback"


class Failing(Defense):
    """Every client fails from some round on, told by what the server has published."""

    refresh_rounds = 1

    def __init__(self, first: int) -> None:
        self.first, self.rounds = first, 0

    def prepare(self, context: Any) -> dict[str, Tensor]:
        self.rounds += 1
        return {"bad": torch.tensor(float(self.rounds > self.first))}

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        return updates / (1 - context.public["bad"])


def test_what_was_computed_before_a_failed_round_is_kept(
    runtime: Runtime, digits: Dataset, tmp_path: Path
) -> None:
    config = small_experiment(defense=custom("Failing", first=3), checkpoint_every=100)
    with pytest.raises(RunError, match="round 3: 0 of 9 clients sent a usable update, fewer than"):
        Simulation(config, dataset=digits, runtime=runtime, output=tmp_path / "run").run()
    kept = CheckpointFolder(tmp_path / "run/checkpoints", config.fingerprint()).latest()
    assert kept is not None and kept.rounds_done == 3 and len(kept.history) == 3


def test_a_round_computes_those_who_report_in_time_and_records_the_rest(
    runtime: Runtime, digits: Dataset, tmp_path: Path
) -> None:
    stragglers = {"name": "lognormal", "median": 10, "sigma": 1, "deadline": 20}
    federation = {"dropout": 0.2, "over_sampling": 1.3, "stragglers": stragglers, "rounds": 4, "evaluate_every": 4}
    config = small_experiment(federation=federation)
    result = Simulation(config, dataset=digits, runtime=runtime, output=tmp_path / "run").run()
    drawn = [prepare(config, digits).spec.participation(r) for r in range(4)]
    rounds = result.rounds
    assert list(rounds["clients"]) == [len(who.clients) for who in drawn]
    assert list(rounds["clients_dropped"]) == [len(who.dropped) for who in drawn]
    assert list(rounds["clients_late"]) == [len(who.late) for who in drawn]
    assert np.allclose(rounds["simulated_seconds"], [who.seconds for who in drawn])
    assert np.allclose(rounds["late_bytes"], rounds["clients_late"] * rounds["upload_bytes"])
    assert rounds["clients_dropped"].sum() and rounds["clients_late"].sum()
    assert result.summary["participation"]["simulated_seconds"] == pytest.approx(
        sum(w.seconds or 0 for w in drawn)
    )

    strict = small_experiment(federation={**federation, "min_clients": 9, "dropout": 0.6})
    with pytest.raises(RunError, match=r"of 12 clients sent a usable update.*\(9\): \d dropped out, \d were late"):
        Simulation(strict, dataset=digits, runtime=runtime).run()


def test_a_full_federation_says_nothing_of_participation(runtime: Runtime, digits: Dataset) -> None:
    result = Simulation(small_experiment(federation={"rounds": 1}), dataset=digits, runtime=runtime).run()
    assert "clients_late" not in result.rounds and result.summary["participation"] is None
