"""What every attack must do: find a known answer, and never be the worse for knowing more."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedsim.attacks.analytic import AnalyticConfig
from fedsim.attacks.base import AttackSettings
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.idlg import IDLGConfig
from fedsim.attacks.r_gap import RGAPConfig
from fedsim.attacks.strategies import strategies_of
from fedsim.defenses.base import DefenseSettings
from fedsim.defenses.dp import GaussianConfig, LaplacianConfig
from fedsim.defenses.gc import GradientCompressionConfig
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.defenses.pld import PLDConfig
from fedsim.learning.models import Model
from fedsim.privacy.metrics import score
from tests.attacks.problems import observe, victims
from tests.attacks.test_strategies import defended, psnr

SHAPE = (1, 8, 8)
SOLVERS = [
    (DLGConfig(iterations=300), 40),
    (DLGConfig(labels="known"), 40),
    (DLGConfig(labels="recovered"), 40),
    (IDLGConfig(), 40),
    (AnalyticConfig(), 80),
    (RGAPConfig(), 80),
    (GIAConfig(iterations=400), 25),
]


@pytest.mark.parametrize(("attack", "least"), SOLVERS, ids=lambda value: str(getattr(value, "title", value)))
def test_the_exact_gradient_of_a_convex_model_gives_the_image(attack: AttackSettings, least: float) -> None:
    """Softmax regression: its loss is convex in the weights, its gradient (p − y)xᵀ has one image as its cause."""
    torch.manual_seed(0)
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), SHAPE, 10)
    images, labels = victims(3, shape=SHAPE)
    seen = observe(model, images, labels, know_labels=attack.knows_labels)
    found = attack.build().reconstruct(seen)
    assert min(row.PSNR for row in score(images, found.images)) > least
    assert torch.equal(found.labels, labels) and not found.stalled.any()


NOISE = 1.0
"""Decibels by which two searches for three images may differ by chance."""


@pytest.mark.parametrize(
    "defense",
    [
        GradDefenseConfig(sigma=0.02),
        GradDefenseConfig(sigma=1e-4),
        GradientCompressionConfig(prune=0.5),
        GaussianConfig(sigma=3e-3),
        LaplacianConfig(sigma=3e-3),
        PLDConfig(prune=0.05),
        PLDConfig(prune=0.6),
    ],
    ids=lambda defense: f"{defense.name}",
)
def test_who_knows_more_does_no_worse(defense: DefenseSettings) -> None:
    images, observation, secrets = defended(defense, count=2, observations=2)
    assert observation.knowledge is not None
    told = replace(observation, knowledge=replace(observation.knowledge, secrets=secrets))
    naive = psnr(images, observation, "", 60)
    adaptive = [psnr(images, observation, name, 60) for name in strategies_of(defense, "adaptive", 2)]
    oracle = [psnr(images, told, name, 60) for name in strategies_of(defense, "oracle", 2)]
    assert max(adaptive) > naive - NOISE
    if oracle:
        assert max(*oracle, *adaptive) > max(adaptive) - NOISE and max(oracle) > naive - NOISE
