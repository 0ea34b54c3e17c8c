from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

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
from tests.conftest import small_experiment

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


def test_what_the_naive_adversary_learns_is_shared_by_defenses_and_nothing_else() -> None:
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


@pytest.mark.ray
def test_each_adversary_learns_once_and_shards_change_no_bit(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[AttackJob] = []
    once = Federation.learn

    def counted(self: Federation, job: AttackJob, *others: Any) -> Any:
        learned.append(job)
        return once(self, job, *others)

    monkeypatch.setattr(Federation, "learn", counted)
    found = []
    for shard in (2, 5):
        audit = AUDIT | {"victims_per_shard": shard}
        config = small_experiment(attacks=[INVERTER], audit=audit, defense=DEFENSE, federation={"rounds": 1})
        result = Simulation(config, runtime=runtime).run()
        found.append([(one.adversary, one.strategy, one.reconstructions) for one in result.audits])
    names = [("naive", ""), ("adaptive", "simulated"), ("adaptive", "simulated_average")]
    assert [(job.adversary, job.strategy) for job in learned] == 2 * names
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
