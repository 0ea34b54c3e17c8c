"""The dummy's gradient goes through the defense as the victim's did."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fedsim.attacks.gradient_matching as matching_module
from fedsim.attacks.base import Attack
from fedsim.attacks.distances import CosineDistance, SquaredError
from fedsim.attacks.dlg import DLGConfig
from fedsim.attacks.estimates import clipping_norm
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.gradient_matching import GradientMatching
from fedsim.attacks.strategies import apply, armed, strategies_of, transformed
from fedsim.defenses.base import ClientBatch, ClientContext, DefenseSettings
from fedsim.defenses.dp import GaussianConfig, LaplacianConfig
from fedsim.defenses.gc import GradientCompressionConfig
from fedsim.learning.models import Model
from fedsim.privacy.metrics import score
from fedsim.privacy.observation import Knowledge, Observation
from tests.attacks.problems import Perceptron, generator, lenet, observe, rand, victims

ATTACK = DLGConfig(labels="known", iterations=200).build()


def seen_through(
    settings: DefenseSettings, batch: int = 1, rounds: int = 1, model: Model | None = None, **known: str
) -> tuple[Tensor, Tensor, Observation]:
    """Images, labels, and what an adversary who knows the scheme sees of three victims."""
    model = model or lenet()
    images, labels = victims(3, batch, shape=model.shape)
    clean = observe(model, images, labels, know_labels=True)
    sent = []
    for number in range(rounds):
        streams = [generator(10 * number + victim) for victim in range(3)]
        group = ClientBatch(torch.arange(3), images, labels)
        context = ClientContext(model, clean.weights, [group], streams)
        sent.append(settings.build().protect(clean.gradients, context))
    every = torch.stack(sent, 1)  # type: ignore[arg-type]
    knowledge = Knowledge(settings, {}, {}, every[:, 1:], **known)  # type: ignore[arg-type]
    return images, labels, replace(clean, gradients=every[:, 0], knowledge=knowledge)


CLIPPED = GaussianConfig(sigma=0, clipping_norm=0.5)
CASES = [
    ("clipped", CLIPPED, 1),
    ("clipped", CLIPPED, 2),
    ("clipped", GaussianConfig(sigma=0, clipping_norm=0.5, clip="sample"), 2),
    ("laplace", LaplacianConfig(sigma=0, clipping_norm=0.5), 1),
    ("pruned", GradientCompressionConfig(prune=0.6), 1),
    ("pruned", GradientCompressionConfig(prune=0.6), 2),
]


@pytest.mark.parametrize(("name", "settings", "batch"), CASES)
def test_the_true_image_leaves_no_residual_where_it_did_before(
    name: str, settings: DefenseSettings, batch: int
) -> None:
    images, labels, plain = seen_through(settings, batch)
    seen = apply(name, plain, ATTACK)
    attack = armed(name, seen, ATTACK)
    before, after = (attack.matching_loss(one, images, labels) for one in (plain, seen))
    assert before is not None and after is not None
    assert float(after.max()) < 1e-6 < 1e-3 < float(before.min())


@pytest.mark.parametrize(("name", "settings", "batch"), CASES)
@pytest.mark.parametrize("distance", [SquaredError, CosineDistance])
def test_the_derivative_is_that_of_the_transformed_gradient(
    name: str, settings: DefenseSettings, batch: int, distance: type
) -> None:
    _, _, plain = seen_through(settings, batch)
    matching = GradientMatching(apply(name, plain, ATTACK), distance, ("body.2.bias",), torch.float64)
    dummy = rand(3, batch, 1, 16, 16, seed=4, dtype=torch.float64)
    p = rand(3, batch, 10, seed=6, dtype=torch.float64).softmax(-1)
    step, turn = rand(*dummy.shape, seed=5, dtype=torch.float64) - 0.5, rand(*p.shape, seed=8).double() - 0.5
    turn = turn - turn.mean(-1, keepdim=True)
    match, everyone, tiny = matching(dummy, p, torch.arange(3)), torch.arange(3), 1e-6
    up, down = (matching(dummy + s * step, p + s * turn, everyone).loss for s in (tiny, -tiny))
    slope = (match.by_images * step).flatten(1).sum(1) + (match.by_probabilities * turn).flatten(1).sum(1)
    torch.testing.assert_close(slope, (up - down) / (2 * tiny), rtol=1e-4, atol=1e-9)


def test_a_gradient_within_the_norm_is_left_as_it_is() -> None:
    _, _, plain = seen_through(GaussianConfig(sigma=0, clipping_norm=1e6))
    everyone, dummy, p = torch.arange(3), rand(3, 1, 1, 16, 16, seed=4), torch.full((3, 1, 10), 0.1)
    one, other = (
        GradientMatching(o, SquaredError)(dummy, p, everyone) for o in (plain, apply("clipped", plain, ATTACK))
    )
    assert torch.equal(one.loss, other.loss) and torch.equal(one.by_images, other.by_images)


def test_soft_labels_absorb_clipping_and_a_cosine_does_not_see_it() -> None:
    """The gradient is linear in p − y: labels p + c·(y − p) give c times the gradient of the same images."""
    images, labels, plain = seen_through(CLIPPED, 2)
    clean = observe(plain.model, images, labels).gradients
    factor = (plain.gradients.norm(dim=1) / clean.norm(dim=1))[:, None, None]
    assert float(factor.max()) < 0.9
    answers = torch.stack([plain.model.logits(plain.weights, x).softmax(-1) for x in images])
    hard = torch.nn.functional.one_hot(labels, 10).float()
    soft, everyone = torch.lerp(answers, hard, factor), torch.arange(3)
    losses = [GradientMatching(plain, SquaredError)(images, p, everyone).loss for p in (hard, soft)]
    assert float(losses[1].max()) < 1e-9 < 0.01 < float(losses[0].min())
    assert float(GradientMatching(plain, CosineDistance)(images, hard, everyone).loss.max()) < 1e-9


def test_samples_that_are_clipped_one_by_one_are_so_for_any_model_and_in_any_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = GaussianConfig(sigma=0, clipping_norm=0.5, clip="sample")
    images, labels, plain = seen_through(settings, 2, model=Model(Perceptron(64, 10), (1, 8, 8), 10))
    seen = apply("clipped", plain, ATTACK)
    whole = ATTACK.matching_loss(seen, images, labels)
    monkeypatch.setitem(matching_module.PIECE_BYTES, "cpu", 1)
    pieces = ATTACK.matching_loss(seen, images, labels)
    assert whole is not None and pieces is not None and float(torch.maximum(whole, pieces).max()) < 1e-6


@pytest.mark.parametrize("attack", [ATTACK, GIAConfig(iterations=200, objective="l1").build()])
def test_clipping_alone_protects_nobody_from_who_clips_too(attack: Attack) -> None:
    images, _, plain = seen_through(CLIPPED)
    naive, knowing = (
        [row.PSNR for row in score(images, attack.reconstruct(seen).images)]
        for seen in (plain, apply("clipped", plain, attack))
    )
    assert min(knowing) > max(naive) + 10


@pytest.mark.parametrize(("rounds", "sigma", "tolerance"), [(1, 0.002, 0.05), (2, 0.0, 1e-5), (4, 0.02, 0.1)])
def test_the_norm_is_estimated_from_what_was_sent(rounds: int, sigma: float, tolerance: float) -> None:
    settings = GaussianConfig(sigma=sigma, clipping_norm=0.5)
    _, _, plain = seen_through(settings, rounds=rounds, parameters="estimated")
    seen = apply("clipped", plain, ATTACK)
    assert seen.knowledge
    norms = clipping_norm(seen, seen.knowledge)
    torch.testing.assert_close(norms, torch.full((3,), 0.5), rtol=tolerance, atol=0)
    again = transformed("clipped", replace(seen, transformation=None)).transformation
    assert torch.equal(again.norms, norms), "the audit finds the same norm in what the attack has seen"  # type: ignore[union-attr]


def test_who_clips_is_named_where_there_is_clipping() -> None:
    for settings in (GaussianConfig(), LaplacianConfig()):
        assert "clipped" not in strategies_of(settings, "adaptive", 1)
        clipping = settings.model_copy(update={"clipping_norm": 1.0})
        assert "clipped" in strategies_of(clipping, "adaptive", 1)
    assert "pruned" in strategies_of(GradientCompressionConfig(), "adaptive", 1)
