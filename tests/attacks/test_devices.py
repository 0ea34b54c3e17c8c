"""Attacks on a GPU, as far as a machine without one can tell: nothing that is on it meets what is not."""

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.attacks import learning
from fedsim.attacks.strategies import strategies_of
from fedsim.config import parse_config
from fedsim.data.datasets import load_dataset
from fedsim.engine import chunks, lessons, probes, session
from fedsim.engine.chunks import AttackJob
from fedsim.engine.server import ServerSession
from fedsim.engine.session import Session
from fedsim.preparation import prepare
from fedsim.randomness import torch_stream, torch_streams
from tests.pretended_gpu import GPU, PretendedGPU

# PLD is missing: it makes a generator for the device itself, and a generator cannot pretend.
DEFENSES: list[dict[str, Any]] = [
    {"name": "none"},
    {"name": "graddefense", "sigma": 0.01, "clipping_norm": 0.01},
    {"name": "graddefense", "variant": "published"},
    {"name": "gc", "prune": 0.1},
    {"name": "dp_gaussian", "sigma": 0.01, "clipping_norm": 0.1},
    {"name": "dp_laplacian", "sigma": 0.01},
]
ATTACKS: list[dict[str, Any]] = [
    {"name": "gia", "iterations": 1},
    {"name": "dlg", "iterations": 1},
    {"name": "gia", "iterations": 1, "tv": [0.3, 3], "tuning_victims": 2},
    {"name": "generative", "iterations": 1, "steps": 1, "refine_iterations": 1, "batch": 8},
    {"name": "inverter", "steps": 1, "draws": 1, "components": 8, "width": 8, "batch": 8},
]


@pytest.fixture(autouse=True)
def streams_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator cannot pretend."""
    on_cpu = lambda *arguments, device="cpu": torch_stream(*arguments)  # noqa: E731
    monkeypatch.setattr(learning, "torch_stream", on_cpu)
    all_on_cpu = lambda *arguments, last, device="cpu": torch_streams(*arguments, last=last)  # noqa: E731
    monkeypatch.setattr(session, "torch_streams", all_on_cpu)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack["name"])
@pytest.mark.parametrize("defense", DEFENSES, ids=lambda defense: defense["name"])
def test_no_tensor_meets_one_of_another_device(defense: dict[str, Any], attack: dict[str, Any]) -> None:
    federation = {"rounds": 1, "clients": 20, "clients_per_round": 2}
    audit = {"victims": 2, "adversaries": ["naive", "adaptive", "oracle"], "observations": 3}
    config = parse_config({"attacks": [attack], "federation": federation, "defense": defense, "audit": audit})
    dataset, settings = load_dataset(config.data), config.attacks[0]
    prepared = prepare(config, dataset)
    server = ServerSession(prepared.spec, dataset)
    server.prepare(0)
    labels = np.zeros((2, 1), dtype=np.int64) if settings.knows_labels else None
    with PretendedGPU() as gpu:
        own = Session(prepared.spec, dataset, GPU)
        weights = own.model.initial_weights().to(GPU)
        public = {name: tensor.to(GPU) for name, tensor in server.public.items()}
        payload = probes.probe(own, weights, public, 0, prepared.victims[0])
        for adversary in config.audit.adversaries:
            for strategy in strategies_of(config.defense, adversary, 3, settings):
                job = AttackJob(0, 1, labels, (1, 2), adversary, strategy)
                learned = None
                if settings.public_source:
                    images = prepared.public[settings.public_source]
                    learned = lessons.learn(own, weights, public, images, job, 0).learned
                found, seen = chunks.attack(own, weights, payload, job, learned)
                truth = torch.zeros(2, 1, *dataset.shape), torch.zeros(2, 1, dtype=torch.long)
                chunks.matching_loss(own, weights, seen, job, *truth, learned)
                assert found.images.device.type == "cpu"
    assert not gpu.mixed


def test_what_mixes_is_noticed() -> None:
    with PretendedGPU() as gpu:
        there = torch.ones(3).to(GPU)
        assert (there * 2).device == GPU and (there + 1).cpu().device.type == "cpu"
        assert not gpu.mixed
        torch.zeros(3) + there * 2
        there[:2].numpy()
    assert {mix.split()[0] for mix in gpu.mixed} == {"add", "numpy"}
