from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedsim.attacks.estimates import noise_std, noisy_slices
from fedsim.attacks.gia import GIAConfig
from fedsim.attacks.strategies import apply
from fedsim.defenses.base import DefenseSettings
from fedsim.defenses.dp import GaussianConfig, LaplacianConfig
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.privacy.observation import Knowledge, Observation
from tests.attacks.problems import generator, lenet, observe, victims


def noisy(settings: DefenseSettings, noise: Tensor, estimated: bool = True) -> Observation:
    """What is seen of two victims in R rounds whose noise is [2, R, d], under a scheme of unknown parameters."""
    clean = observe(lenet(), *victims(2), know_labels=True)
    rounds = clean.gradients[:, None] + noise
    knowledge = Knowledge(settings, {}, {}, rounds[:, 1:], "estimated" if estimated else "public")
    return replace(clean, gradients=rounds[:, 0], knowledge=knowledge)


def std_of(observation: Observation) -> Tensor:
    assert observation.knowledge
    return noise_std(observation, observation.knowledge)


def draw(rounds: int, laplacian: bool = False) -> Tensor:
    dimension = lenet().layout.dimension
    if laplacian:
        pairs = torch.empty(2, 2, rounds, dimension).exponential_(generator=generator(1))
        return (pairs[0] - pairs[1]) / 2**0.5
    return torch.randn(2, rounds, dimension, generator=generator(1))


@pytest.mark.parametrize("sigma", [0.01, 0.3])
@pytest.mark.parametrize("laplacian", [False, True])
@pytest.mark.parametrize(("rounds", "tolerance"), [(1, 0.2), (2, 0.03)])
def test_the_strength_of_noise_on_every_entry_is_estimated(
    sigma: float, laplacian: bool, rounds: int, tolerance: float
) -> None:
    settings = LaplacianConfig(sigma=9) if laplacian else GaussianConfig(sigma=9)
    observation = noisy(settings, sigma * draw(rounds, laplacian))
    torch.testing.assert_close(std_of(observation), torch.full((2, 1), sigma), rtol=tolerance, atol=0)


def test_rounds_tell_the_mean_strength_of_noise_on_some_slices() -> None:
    noise = draw(3)
    noise[:, :, ::2] = 0
    expected = torch.full((2, 1), 0.1 * 0.5**0.5)
    torch.testing.assert_close(std_of(noisy(GradDefenseConfig(), 0.1 * noise)), expected, rtol=0.03, atol=0)


def test_public_parameters_give_the_strength_exactly() -> None:
    observation = noisy(GradDefenseConfig(sigma=0.2, slices=8, perturbed=2), draw(1), estimated=False)
    torch.testing.assert_close(std_of(observation), torch.full((2, 1), 0.1))


def test_noisy_slices_end_at_the_widest_gap() -> None:
    residuals = torch.tensor([[1e-9, 3.0, 1e-7, 2.0, 5.0], [4.0, torch.nan, 1e-3, 1e-8, 2e-9]])
    hidden = Knowledge(GradDefenseConfig(slices=5, perturbed=5), {}, {}, torch.empty(0), "estimated")
    found = noisy_slices(residuals, hidden)
    assert found.tolist() == [[False, True, False, True, True], [True, False, True, False, False]]
    assert noisy_slices(torch.tensor([[2.0]]), hidden).tolist() == [[True]]
    told = replace(hidden, defense=GradDefenseConfig(slices=5, perturbed=2), parameters="public")
    assert noisy_slices(residuals, told).nonzero().tolist() == [[0, 1], [0, 4], [1, 0], [1, 2]]


@pytest.mark.parametrize("strategy", ["likelihood", "denoise"])
def test_an_attacker_who_estimates_does_not_look_at_the_parameters(strategy: str) -> None:
    attack = GIAConfig().build()
    seen = [
        apply(strategy, noisy(settings, 0.1 * draw(1)), attack)
        for settings in (GaussianConfig(sigma=0.1), GaussianConfig(sigma=7.0))
    ]
    assert torch.equal(seen[0].gradients, seen[1].gradients)
    assert seen[0].trust is seen[1].trust is None or torch.equal(seen[0].trust, seen[1].trust)  # type: ignore[arg-type]


def test_slices_are_inferred_without_knowing_how_many_are_noisy() -> None:
    selected = torch.zeros(2, 10, dtype=torch.bool)
    selected[0, :3], selected[1, 4:] = True, True
    bounds = torch.arange(11) * lenet().layout.dimension // 10
    mask = selected.repeat_interleave(bounds.diff(), 1)
    observation = noisy(GradDefenseConfig(perturbed=1), 0.02 * draw(1) * mask[:, None])
    assert observation.knowledge
    observation = replace(observation, knowledge=replace(observation.knowledge, public={"slice_bounds": bounds}))
    trust = apply("slices", observation, GIAConfig(iterations=300).build()).trust
    assert trust is not None and torch.equal(trust == 0, mask)
