from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.attacks.learning import LearningContext
from fedsim.data.datasets import Dataset, DigitsConfig, load_dataset
from fedsim.errors import ConfigError
from fedsim.learning.batches import ImageStore
from fedsim.preparation import prepare
from fedsim.privacy import audit
from fedsim.privacy.observation import Knowledge, Observation, Payload, Reconstruction, Victim
from fedsim.results import AuditResult, RunFolder
from tests.conftest import small_experiment

AUDIT = {"victims": 6, "batch_size": 2}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DigitsConfig())


def reconstruction(images: torch.Tensor, loss: list[float], exhausted: bool = False) -> Reconstruction:
    count = len(images)
    return Reconstruction(
        images=images,
        labels=torch.zeros(count, images.shape[1], dtype=torch.long),
        loss=torch.tensor(loss),
        iterations=torch.full((count,), 7),
        stalled=torch.zeros(count, dtype=torch.bool),
        exhausted=torch.full((count,), exhausted),
        seconds=2.0,
    )


def test_victims_are_other_clients_with_their_own_images_and_the_same_for_every_defense(digits: Dataset) -> None:
    plain = small_experiment(audit=AUDIT, attacks=[{"name": "dlg"}])
    defended = small_experiment(audit=AUDIT, attacks=[{"name": "gia"}], defense={"name": "gc"})
    spec = prepare(plain, digits).spec
    victims = audit.choose_victims(plain, spec.partition, 0)
    assert len({v.client for v in victims}) == 6
    for victim in victims:
        assert set(victim.images) <= set(spec.partition.client(victim.client))
        assert len(set(victim.images)) == 2
    again = audit.choose_victims(defended, spec.partition, 0)
    assert [v.images.tolist() for v in victims] == [v.images.tolist() for v in again]
    other_round = audit.choose_victims(plain, spec.partition, 1)
    assert [v.client for v in victims] != [v.client for v in other_round]


def test_more_victims_than_clients_share_clients_but_not_images_or_noise(digits: Dataset) -> None:
    config = small_experiment(audit={"victims": 30}, attacks=[{"name": "dlg"}])
    victims = audit.choose_victims(config, prepare(config, digits).spec.partition, 0)
    assert len({v.client for v in victims}) == 20
    assert len({v.stream for v in victims}) == 30


def test_a_batch_no_client_can_fill_is_refused(digits: Dataset) -> None:
    config = small_experiment(audit={"batch_size": 900}, attacks=[{"name": "dlg"}])
    with pytest.raises(ConfigError, match="no client holds 900 images"):
        prepare(config, digits)


def test_an_observation_has_no_room_for_ground_truth() -> None:
    """Only what the protocol shows the server may be reachable; a new field must be argued for here."""
    assert {field.name for field in fields(Observation)} == {
        "model",
        "weights",
        "gradients",
        "batch_size",
        "statistics",
        "labels",
        "seeds",
        "trust",  # made by the attacker
        "knowledge",  # None for the naive adversary
        "local",  # steps and learning rate, which the server itself prescribes
        "transformation",  # made by the attacker, from the defense it knows and what was sent
    }
    # The scheme and what it publishes are known to the adaptive adversary; draws are for the oracle alone, which
    # tests/engine/test_chunks.py sees to; repeats were sent as the gradients were; parameters says whether the
    # defense's strengths are public.
    assert {field.name for field in fields(Knowledge)} == {"defense", "public", "secrets", "repeats", "parameters"}
    assert {field.name for field in fields(Payload)} == {
        "gradients",
        "statistics",
        "repeats",
        "public",
        "secrets",
        "trust",
    }


def test_what_an_attack_learns_from_has_no_room_for_victims() -> None:
    assert {field.name for field in fields(LearningContext)} == {
        "model",
        "weights",
        "public",  # images that equal no training image: tests/data/test_public.py
        "batch_size",
        "seed",
        "knowledge",  # without secrets and repeats: tests/engine/test_lessons.py
        "rounds",
        "local",
        "strategy",
    }


def test_scores_name_victims_and_images(digits: Dataset) -> None:
    victims = [Victim(4, np.array([3, 8]), 0), Victim(9, np.array([20, 1]), 1)]
    truth = audit.GroundTruth.of(ImageStore.of(digits.train_images, digits.train_labels, "cpu"), victims)
    found = reconstruction(truth.images.flip(1), [0.0, 0.0])
    rows = audit.score(truth, found, None, victims, "dlg", "naive", "", 5)
    assert [(r.victim, r.client, r.image) for r in rows] == [(0, 4, 0), (0, 4, 1), (1, 9, 0), (1, 9, 1)]
    assert all(r.capped and r.PSNR == 100 and r.round == 5 and r.seconds == 0.5 for r in rows)
    assert [r.label for r in rows] == [int(digits.train_labels[i]) for i in (3, 8, 20, 1)]


@pytest.mark.parametrize(
    ("loss", "at_truth", "exhausted", "expected"),
    [
        (0.3, 0.4, False, (False, False)),  # below the truth: the defense misled a good optimiser
        (0.4, 0.4, True, (False, False)),  # at the truth
        (0.5, 0.4, False, (True, False)),  # above it, and done: the optimiser failed
        (0.5, 0.4, True, (False, True)),  # above it, still falling
        (1e-8, 0.0, False, (False, False)),  # matched, up to rounding
        (1e-3, 0.0, False, (True, False)),
    ],
)
def test_an_attack_that_ends_above_the_loss_of_the_truth_shows_nothing(
    loss: float, at_truth: float, exhausted: bool, expected: tuple[bool, bool]
) -> None:
    found = reconstruction(torch.zeros(1, 1, 1, 8, 8), [loss], exhausted)
    sound = audit.Soundness.of(found, torch.tensor([at_truth]))
    assert (bool(sound.stalled), bool(sound.exhausted)) == expected


def test_floors_are_those_of_blind_guesses(digits: Dataset) -> None:
    images = torch.full((3, 1, 1, 8, 8), 0.5)
    truth = audit.GroundTruth(images, torch.zeros(3, 1, dtype=torch.long))
    floors = audit.floor_scores(truth, np.full((1, 8, 8), 0.6, np.float32), seed=0)
    assert floors["grey"]["PSNR"] == 100
    assert floors["mean"]["PSNR"] == pytest.approx(20, abs=1e-4)
    assert set(floors) == {"noise", "uniform", "mean", "grey"}


def test_an_audit_comes_back_from_its_files(tmp_path: Path, digits: Dataset) -> None:
    victims = [Victim(4, np.array([3]), 0)]
    truth = audit.GroundTruth.of(ImageStore.of(digits.train_images, digits.train_labels, "cpu"), victims)
    rows = audit.score(truth, reconstruction(truth.images, [0.0]), None, victims, "dlg", "naive", "", 0)
    pictures = audit.as_bytes(truth.images)
    saved = AuditResult("dlg", "naive", "", 0, rows, pictures, pictures)
    folder = RunFolder(tmp_path)
    folder.save_audit(saved)
    found = folder.load_audit("dlg", "naive", "", 0)
    assert found is not None
    assert found.rows == rows
    assert np.array_equal(found.originals, pictures)
    assert folder.load_audit("gia", "naive", "", 0) is None
    assert folder.load_audit("dlg", "adaptive", "slices", 0) is None


def test_pictures_are_clamped_and_finite() -> None:
    images = torch.tensor([-1.0, 0.5, 2.0, float("nan")]).reshape(1, 1, 1, 2, 2)
    assert audit.as_bytes(images).flatten().tolist() == [0, 128, 255, 128]
