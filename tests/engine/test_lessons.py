from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.attacks import gia
from fedsim.data.datasets import DigitsConfig, load_dataset
from fedsim.engine import lessons
from fedsim.engine.chunks import AttackJob
from fedsim.engine.federation import Federation
from fedsim.engine.runtime import Runtime
from fedsim.engine.server import ServerSession
from fedsim.engine.session import Session
from fedsim.errors import ConfigError
from fedsim.preparation import Prepared, prepare
from fedsim.progress import Reporter
from fedsim.simulation import Simulation
from tests.conftest import other_workers, small_experiment

INVERTER = {"name": "inverter", "images": 60, "steps": 10, "draws": 2, "width": 16, "components": 20}
AUDIT = {"victims": 5, "adversaries": ["naive", "adaptive", "oracle"], "observations": 2}
GENERATIVE = {
    "name": "generative",
    "images": 60,
    "steps": 10,
    "width": 16,
    "latents": 4,
    "iterations": 5,
    "refine_iterations": 5,
}
TUNED = {"name": "gia", "iterations": 6, "tv": [3, 300], "tuning_victims": 3}
DEFENSE = {"name": "graddefense", "sigma": 0.5}


def prepared(**changes: Any) -> Prepared:
    settings: dict[str, Any] = {"attacks": [INVERTER], "audit": AUDIT, "defense": DEFENSE} | changes
    return prepare(small_experiment(**settings), load_dataset(DigitsConfig()))


def test_no_image_of_a_victim_is_public() -> None:
    ready = prepared()
    public = {image.tobytes() for image in ready.public["test"].images}
    for victims in ready.victims.values():
        for victim in victims:
            assert not public & {ready.dataset.train_images[index].tobytes() for index in victim.images}


@pytest.mark.parametrize(
    ("adversary", "strategy", "knows", "rounds"),
    [("naive", "", False, 1), ("adaptive", "simulated", True, 1), ("adaptive", "simulated_average", True, 2)],
)
def test_who_knows_the_defense_learns_through_it(
    monkeypatch: pytest.MonkeyPatch, adversary: Any, strategy: str, knows: bool, rounds: int
) -> None:
    ready = prepared()
    server = ServerSession(ready.spec, ready.dataset)
    server.prepare(0)
    seen: list[Any] = []
    monkeypatch.setattr("fedsim.attacks.inverter.Inverter.learn", lambda self, context: seen.append(context))
    session = Session(ready.spec, ready.dataset, torch.device("cpu"))
    job = AttackJob(0, 1, None, (1, 2), adversary, strategy)
    lessons.learn(session, server.optimizer.weights, server.public, ready.public["test"], job, 0)
    (context,) = seen
    assert (context.knowledge is not None) == knows and context.rounds == rounds
    if knows:
        assert not context.knowledge.secrets and context.knowledge.repeats.numel() == 0
        assert torch.equal(context.knowledge.public["slice_bounds"], server.public["slice_bounds"])


@pytest.mark.parametrize(
    ("adversary", "strategy", "rounds"),
    [("naive", "", 1), ("adaptive", "simulated", 2), ("adaptive", "slices", 2), ("oracle", "told_slices", 2)],
)
def test_who_rehearses_learns_by_the_strategy_and_of_no_victim(
    adversary: Any, strategy: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared(attacks=[TUNED])
    server = ServerSession(ready.spec, ready.dataset)
    server.prepare(0)
    session = Session(ready.spec, ready.dataset, torch.device("cpu"))
    seen: list[Any] = []
    rehearse = gia.rehearse

    def watched(context: Any, *others: Any) -> Any:
        seen.append(context)
        return rehearse(context, *others)

    monkeypatch.setattr("fedsim.attacks.gia.rehearse", watched)
    # No image of a client is at hand at all: any look at one raises.
    monkeypatch.setattr("fedsim.engine.session.Session.train_data", property(lambda self: 1 / 0))
    job = AttackJob(0, 1, np.array([[3], [4]]), (1, 2), adversary, strategy)
    images = ready.public["test"]
    weights, public = server.optimizer.weights, server.public
    lesson, other = (
        lessons.learn(session, weights, public, images, one, 0)
        for one in (job, replace(job, labels=np.array([[7]]), seeds=(9,)))
    )
    assert lesson.learned == other.learned and lesson.report.startswith("tv ")
    context = seen[0]
    assert (context.rounds, context.strategy) == (rounds, strategy)
    assert (context.knowledge is None) == (adversary == "naive")


def test_what_is_not_learned_through_the_defense_is_shared_by_defenses_and_nothing_else() -> None:
    ready, job = prepared(), AttackJob(0, 1, None, (1, 2))
    weights = np.zeros(5, np.float32)

    def key(at: np.ndarray = weights, job: AttackJob = job, round_: int = 0, **changes: Any) -> str:
        config = prepared(**changes).spec.config if changes else ready.spec.config
        return lessons.shared_key(config, at, ready.public["test"], job, round_)

    assert key() == key(defense={"name": "gc"}) == key(job=replace(job, seeds=(7,)))
    others = {
        key(weights + 1),
        key(round_=1),
        key(job=replace(job, batch_size=2)),
        key(seed=1),
        key(attacks=[INVERTER | {"steps": 11}]),
    }
    assert len(others | {key()}) == 6


def test_lessons_are_shared_as_far_as_they_cannot_differ() -> None:
    def scopes(attack: dict[str, Any]) -> list[tuple[bool, int, str]]:
        config = prepared(attacks=[attack]).spec.config
        jobs = [("naive", ""), ("adaptive", "simulated"), ("adaptive", "slices"), ("adaptive", "average")]
        found = [lessons.Scope.of(config, AttackJob(0, 1, None, (1,), *job)) for job in jobs]
        return [(scope.simulates, scope.rounds, scope.strategy) for scope in found]

    assert scopes(GENERATIVE) == 4 * [(False, 1, "")]
    assert scopes(INVERTER) == [(False, 1, ""), (True, 1, ""), (True, 1, ""), (True, 2, "")]
    rehearsed = [(True, 2, name) for name in ("simulated", "slices", "average")]
    assert scopes(TUNED) == [(False, 1, ""), *rehearsed]


@pytest.mark.ray
def test_each_adversary_learns_once_and_shards_change_no_bit(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[list[tuple[str, str]]] = []
    once = Federation.learn

    def counted(self: Federation, wanted: Any, *others: Any) -> Any:
        learned.append([(job.adversary, job.strategy) for job, _ in wanted])
        return once(self, wanted, *others)

    monkeypatch.setattr(Federation, "learn", counted)
    found = []
    for shard in (2, 5):
        audit = AUDIT | {"victims_per_shard": shard}
        config = small_experiment(attacks=[INVERTER], audit=audit, defense=DEFENSE, federation={"rounds": 1})
        result = Simulation(config, runtime=runtime).run()
        found.append([(one.adversary, one.strategy, one.reconstructions) for one in result.audits])
    names = [("naive", ""), ("adaptive", "simulated"), ("adaptive", "simulated_average")]
    assert learned == 2 * [names[:2], names[2:]], "two workers learn side by side, and none more than once"
    assert [one[:2] for one in found[0]] == names
    for few, many in zip(*found, strict=True):
        assert few[:2] == many[:2] and np.array_equal(few[2], many[2])


class Notes(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.ray
def test_a_generator_is_learned_once_for_all_adversaries_and_its_ceiling_is_told(runtime: Runtime) -> None:
    found, told = [], []
    for shard in (2, 5):
        audit = AUDIT | {"victims_per_shard": shard}
        config = small_experiment(
            seed=7, attacks=[GENERATIVE], audit=audit, defense=DEFENSE, federation={"rounds": 1}
        )
        notes = Notes()
        result = Simulation(config, runtime=runtime, reporter=notes).run()
        found.append(result.audits)
        told += [line for line in notes.lines if "ceiling" in line]
    assert [line.split(":")[1].strip() for line in told] == ["generative"]
    names = [("naive", ""), *(("adaptive", name) for name in ("slices", "denoise", "average", "agreement"))]
    assert [(one.adversary, one.strategy) for one in found[0]] == [*names, ("oracle", "told_slices")]
    for few, many in zip(*found, strict=True):
        gap = np.abs(few.reconstructions.astype(int) - many.reconstructions.astype(int))
        assert gap.max() <= 1, "a byte may be rounded otherwise"
        assert all(row.loss_at_truth is not None for row in few.rows)


@pytest.mark.ray
def test_a_generator_is_shared_by_defenses_though_nobody_is_naive(runtime: Runtime) -> None:
    audit = AUDIT | {"adversaries": ["adaptive"], "observations": 1}
    told, reports = [], []
    for defense in (DEFENSE, {"name": "gc"}):
        config = small_experiment(
            seed=11, attacks=[GENERATIVE], audit=audit, defense=defense, federation={"rounds": 1}
        )
        notes = Notes()
        result = Simulation(config, runtime=runtime, reporter=notes).run()
        told.append([line for line in notes.lines if "ceiling" in line])
        reports += [row.learned for one in result.audits for row in one.rows]
    assert [len(lines) for lines in told] == [1, 0], "the second simulation learned nothing anew"
    assert len(set(reports)) == 1 and reports[0] in told[0][0], "but results of both tell what was learned"


@pytest.mark.ray
def test_weights_are_tuned_once_a_strategy_and_workers_change_no_bit(runtime: Runtime) -> None:
    audit = AUDIT | {"victims_per_shard": 2}
    config = small_experiment(attacks=[TUNED], audit=audit, defense=DEFENSE, federation={"rounds": 1})
    notes = Notes()
    two = Simulation(config, runtime=runtime, reporter=notes).run().audits
    runtime.lessons.clear()
    with other_workers(runtime, 1):
        one = Simulation(config, runtime=runtime).run().audits
    strategies = ["", "simulated", "slices", "denoise", "average", "agreement", "told_slices"]
    assert [audit.strategy for audit in two] == strategies
    reports = [line.split(": ", 2)[-1] for line in notes.lines if "chosen on 3 public victims" in line]
    assert len(reports) == len(strategies), "each is tuned once"
    for few, many, report in zip(one, two, reports, strict=True):
        assert np.array_equal(few.reconstructions, many.reconstructions)
        assert [replace(row, seconds=0) for row in few.rows] == [replace(row, seconds=0) for row in many.rows]
        assert {row.learned for row in many.rows} == {report}
        assert all(row.loss_at_truth is not None for row in many.rows)


def test_bad_public_images_and_estimated_parameters_are_refused_before_anything_starts() -> None:
    with pytest.raises(
        ConfigError, match="audit.parameters: inverter simulates the defense, which takes `public`"
    ):
        prepared(audit=AUDIT | {"parameters": "estimated"})
    digits = load_dataset(DigitsConfig())
    held = replace(digits, test_images=digits.train_images, test_labels=digits.train_labels)
    with pytest.raises(ConfigError, match="public: test: clients hold all of these images"):
        prepare(small_experiment(attacks=[INVERTER]), held)
    with pytest.raises(ConfigError, match="inverter: 20 public images are too few to learn from"):
        prepared(attacks=[{**INVERTER, "images": 20}], audit={"batch_size": 16})
    few = replace(digits, test_images=digits.test_images[:9], test_labels=digits.test_labels[:9])
    with pytest.raises(ConfigError, match="generative: 9 public images are too few to learn from"):
        prepare(small_experiment(attacks=[GENERATIVE]), few)
    with pytest.raises(ConfigError, match="gia: 9 public images are too few to tune `tv` on: 3 gradients of 4 "):
        prepare(small_experiment(attacks=[TUNED], audit={"batch_size": 4}), few)
    with pytest.raises(ConfigError, match="audit.parameters: gia simulates the defense, which takes `public`"):
        prepared(attacks=[TUNED], audit=AUDIT | {"parameters": "estimated"})
    unknown = {"local_learning_rate": "estimated", "payload": "training"}
    with pytest.raises(ConfigError, match="gia: to choose `tv` on public images takes the clients' learning rate"):
        prepared(attacks=[TUNED], audit=unknown)
