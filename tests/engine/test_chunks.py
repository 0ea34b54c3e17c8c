import numpy as np
import pytest
import torch
from torch import nn

from fedsim.data.datasets import DigitsConfig, load_dataset
from fedsim.engine import chunks, probes
from fedsim.engine.chunks import AttackJob
from fedsim.engine.server import ServerSession
from fedsim.engine.session import Session
from fedsim.preparation import prepare
from tests.conftest import small_experiment


def normed(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A small model with batch norm."""
    width = 4 * shape[1] * shape[2]
    layers = [nn.Conv2d(shape[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


@pytest.fixture(scope="module")
def probed() -> tuple[Session, torch.Tensor, chunks.Payload, torch.Tensor]:
    """A session, the weights, what three victims send under GradDefense, and what they send without."""
    audit = {"victims": 3, "observations": 3, "adversaries": ["naive", "adaptive", "oracle"]}
    defense = {"name": "graddefense", "sigma": 0.5}
    config = small_experiment(defense=defense, audit=audit, attacks=[{"name": "dlg"}])
    prepared = prepare(config, load_dataset(DigitsConfig()))
    server = ServerSession(prepared.spec, prepared.dataset)
    server.prepare(0)
    session = Session(prepared.spec, prepared.dataset, torch.device("cpu"))
    weights, victims = server.optimizer.weights, prepared.victims[0]
    payload = probes.probe(session, weights, server.public, 0, victims)
    bare = Session(prepare(small_experiment(audit=audit), prepared.dataset).spec, prepared.dataset, session.device)
    clean = probes.probe(bare, weights, {}, 0, victims)
    return session, weights, payload, torch.from_numpy(clean.gradients)


def test_the_secrets_are_those_of_the_payload(probed) -> None:  # type: ignore[no-untyped-def]
    _, _, payload, clean = probed
    widths = np.diff(payload.public["slice_bounds"])
    noisy = np.repeat(payload.secrets["selected"], widths, axis=1)
    changed = payload.gradients != clean.numpy()
    assert not changed[~noisy].any() and changed[noisy].mean() > 0.999
    assert noisy.any(axis=1).all()


def test_repeats_have_draws_of_their_own(probed) -> None:  # type: ignore[no-untyped-def]
    _, _, payload, clean = probed
    assert payload.repeats is not None and payload.repeats.shape == (3, 2, clean.shape[1])
    every = np.concatenate([payload.gradients[:, None], payload.repeats], axis=1)
    patterns = {(every[v, r] != clean[v].numpy()).tobytes() for v in range(3) for r in range(3)}
    assert len(patterns) == 9


@pytest.mark.parametrize(("adversary", "told"), [("naive", None), ("adaptive", set()), ("oracle", {"selected"})])
def test_only_the_oracle_is_told_secrets(probed, adversary, told) -> None:  # type: ignore[no-untyped-def]
    session, weights, payload, _ = probed
    job = AttackJob(0, 1, None, (1, 2, 3), adversary)
    knowledge = chunks._observation(session, weights, payload, job).knowledge
    assert (None if knowledge is None else set(knowledge.secrets)) == told


def test_the_loss_at_the_truth_is_measured_on_what_the_strategy_saw(probed) -> None:  # type: ignore[no-untyped-def]
    session, weights, payload, clean = probed
    job = AttackJob(0, 1, None, (1, 2, 3), "oracle", "told_slices")
    _, seen = chunks.attack(session, weights, payload, job)
    assert seen.trust is not None
    spec = session.spec
    victims = prepare(spec.config, session.dataset).victims[0]
    images, labels = session.train_data.take(np.stack([victim.images for victim in victims]))
    loss = chunks.matching_loss(session, weights, seen, job, images, labels)
    assert loss is not None and float(loss.max()) < 1e-6, "the clean slices are matched exactly"
    plain = chunks.matching_loss(session, weights, payload, AttackJob(0, 1, None, (1, 2, 3)), images, labels)
    assert plain is not None and float(plain.min()) > 0.1


def test_a_strategy_with_a_distance_of_its_own_is_judged_by_it(probed) -> None:  # type: ignore[no-untyped-def]
    session, weights, payload, clean = probed
    job = AttackJob(0, 1, None, (1, 2, 3), "adaptive", "laplace")
    found, seen = chunks.attack(session, weights, payload, job)
    loss = chunks.matching_loss(session, weights, chunks.Payload.join([seen]), job, found.images, found.labels)
    victims = prepare(session.spec.config, session.dataset).victims[0]
    truth = session.train_data.take(np.stack([victim.images for victim in victims]))
    at_truth = chunks.matching_loss(session, weights, seen, job, *truth)
    sent = np.concatenate([payload.gradients[:, None], payload.repeats], axis=1)
    expected = np.abs(clean.numpy()[:, None] - sent).sum((1, 2)) / np.abs(sent).sum((1, 2))
    assert at_truth is not None
    np.testing.assert_allclose(at_truth.numpy(), expected, rtol=1e-4)
    assert loss is not None and (loss - found.loss).abs().max() < 0.05


@pytest.mark.parametrize("parameters", ["public", "estimated"])
def test_a_strategy_that_clips_the_dummy_is_judged_by_what_it_clips_to(parameters: str) -> None:
    config = small_experiment(
        defense={"name": "dp_gaussian", "sigma": 0, "clipping_norm": 0.5},
        audit={"victims": 2, "adversaries": ["adaptive"], "observations": 2, "parameters": parameters},
        attacks=[{"name": "dlg", "labels": "known", "iterations": 2}],
    )
    prepared = prepare(config, load_dataset(DigitsConfig()))
    session = Session(prepared.spec, prepared.dataset, torch.device("cpu"))
    weights, victims = session.model.initial_weights(), prepared.victims[0]
    images, labels = session.train_data.take(np.stack([victim.images for victim in victims]))
    payload = probes.probe(session, weights, {}, 0, victims)
    losses = []
    for strategy in ("average", "clipped"):
        job = AttackJob(0, 1, labels.numpy(), (1, 2), "adaptive", strategy)
        _, seen = chunks.attack(session, weights, payload, job)
        losses.append(chunks.matching_loss(session, weights, seen, job, images, labels))
    without, clipped = losses
    assert clipped is not None and float(clipped.max()) < 1e-6 < 0.1 < float(without.min())


@pytest.mark.parametrize("parameters", ["public", "estimated"])
def test_adversaries_know_parameters_as_the_audit_says(parameters: str) -> None:
    audit = {"victims": 1, "adversaries": ["naive", "adaptive"], "parameters": parameters}
    config = small_experiment(defense={"name": "dp_gaussian"}, audit=audit, attacks=[{"name": "dlg"}])
    prepared = prepare(config, load_dataset(DigitsConfig()))
    session = Session(prepared.spec, prepared.dataset, torch.device("cpu"))
    payload = chunks.Payload(np.zeros((1, 5), np.float32), np.zeros((1, 0), np.float32))
    job = AttackJob(0, 1, None, (1,), "adaptive", "likelihood")
    knowledge = chunks._observation(session, torch.zeros(5), payload, job).knowledge
    assert knowledge is not None and knowledge.parameters == parameters


def test_gradinversion_compares_with_the_statistics_that_victims_sent() -> None:
    config = small_experiment(
        model={"name": "custom", "factory": "tests.engine.test_chunks:normed"},
        audit={"victims": 2, "batch_size": 3},
        attacks=[{"name": "gradinversion", "labels": "known", "iterations": 3, "restarts": 2}],
    )
    prepared = prepare(config, load_dataset(DigitsConfig()))
    session = Session(prepared.spec, prepared.dataset, torch.device("cpu"))
    weights, victims = session.model.initial_weights(), prepared.victims[0]
    images, labels = session.train_data.take(np.stack([victim.images for victim in victims]))
    payload = probes.probe(session, weights, {}, 0, victims)
    job = AttackJob(0, 3, labels.numpy(), (1, 2))
    found, seen = chunks.attack(session, weights, payload, job)
    at_truth = chunks.matching_loss(session, weights, seen, job, images, labels)
    assert at_truth is not None and float(at_truth.max()) < 1e-6 < 1e-2 < float(found.loss.min())
