import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from fedsim.defenses.base import ServerContext
from fedsim.defenses.denoising import marchenko_pastur_denoise
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.defenses.slicing import published_bounds
from fedsim.errors import ConfigError, RunError
from tests.defenses import published_reference as reference
from tests.defenses.defense_cases import client_context, draw, lenet, public_context, tiny_model

MODEL = tiny_model()
D = MODEL.layout.dimension
EVEN = {"slice_bounds": torch.tensor([0, 7, 15, 22, D])}


def defense(**settings):
    return GradDefenseConfig(**{"slices": 4, "perturbed": 2, "sigma": 0.3} | settings).build()


def noisy_slices(noise, bounds):
    """Which slices of each row hold something: sets of slice numbers."""
    pairs = list(zip(bounds, bounds[1:], strict=False))
    return [{i for i, (a, b) in enumerate(pairs) if row[a:b].any()} for row in noise]


def server_context(weights):
    return ServerContext(MODEL, torch.tensor(weights), round=0)


# --- perturbation ------------------------------------------------------------------------------------------


def test_exactly_k_slices_are_perturbed_entirely():
    updates = draw(8, D)
    context = client_context(MODEL, range(8), public=EVEN)
    noise = defense().protect(updates, context) - updates
    bounds = EVEN["slice_bounds"].tolist()
    chosen = noisy_slices(noise, bounds)
    assert {len(slices) for slices in chosen} == {2}
    for row, slices in zip(noise, chosen, strict=True):
        assert all((row[bounds[i] : bounds[i + 1]] != 0).all() for i in slices)


def test_every_pair_of_slices_is_drawn_equally_often():
    clients = 3000
    context = client_context(MODEL, range(clients), size=1, public=EVEN)
    chosen = noisy_slices(
        defense().protect(torch.zeros(clients, D).double(), context), EVEN["slice_bounds"].tolist()
    )
    counts = [chosen.count(set(pair)) for pair in itertools.combinations(range(4), 2)]
    assert sum(counts) == clients and stats.chisquare(counts).pvalue > 0.01


def test_noise_is_gaussian_of_standard_deviation_sigma():
    model = lenet()
    dimension = model.layout.dimension
    public = {"slice_bounds": torch.tensor([0, 3000, 6000, 9000, dimension])}
    noise = defense().protect(torch.zeros(4, dimension), client_context(model, size=1, public=public))
    assert stats.kstest(noise[noise != 0].numpy(), stats.norm(scale=0.3).cdf).pvalue > 0.01


@pytest.mark.parametrize("variant", ["corrected", "published"])
def test_protection_is_the_clients_own_whatever_its_chunk(variant):
    updates = draw(3, D)
    together = defense(variant=variant).protect(updates, client_context(MODEL, [3, 7, 1], public=EVEN))
    alone = defense(variant=variant).protect(updates[1:2], client_context(MODEL, [7], public=EVEN))
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("variant", ["corrected", "published"])
def test_a_single_slice_is_the_whole_gradient(variant):
    one = defense(variant=variant, slices=1, perturbed=1)
    context = client_context(MODEL, public={"slice_bounds": torch.tensor([0, D])})
    assert (one.protect(torch.zeros(4, D).double(), context) != 0).all()


def test_updates_are_left_alone():
    updates = draw(4, D)
    before = updates.clone()
    defense().protect(updates, client_context(MODEL, public=EVEN))
    assert torch.equal(updates, before)


def test_clipping_bounds_the_selected_slices_of_every_sample():
    settings = {"sigma": 0.0, "clipping_norm": 0.01}
    context = client_context(MODEL, public=EVEN)
    selected = defense()._select(client_context(MODEL, public=EVEN))
    result = defense(**settings).protect(torch.full((4, D), torch.nan).double(), context)
    expected = torch.zeros(4, D).double()
    for rows, gradients in context.per_sample_gradients():
        for row, samples in zip(rows.tolist(), gradients, strict=True):
            for start, stop, chosen in zip([0, 7, 15, 22], [7, 15, 22, D], selected[row], strict=True):
                part = samples[:, start:stop]
                lengths = part.norm(dim=1, keepdim=True)
                expected[row, start:stop] = (part / (lengths / 0.01).clamp(min=1) if chosen else part).mean(0)
    assert torch.allclose(result, expected, atol=1e-14)


# --- the published variant against the slow reference --------------------------------------------------------

RISKS = {
    "even": [1.0, 1.0, 1.0, 1.0],
    "heavy first atom": [40.0, 1.0, 1.0, 1.0],
    "heavy last layer": [1.0, 1.0, 1.0, 50.0],
    "harmless last layers": [5.0, 3.0, 1e-9, 1e-9],
}


class Fixed:
    """The draws that a client's stream holds, in the order in which the defense asks for them."""

    def __init__(self, client, bounds, perturbed):
        context = client_context(MODEL, [client], size=1)
        slices = len(bounds) - 1
        self.chosen = set(context.uniform(slices).topk(perturbed).indices[0].tolist())
        noisy = [index for number in sorted(self.chosen) for index in range(bounds[number], bounds[number + 1])]
        self.entries = dict(zip(noisy, context.normal(len(noisy))[0].tolist(), strict=True))
        self.starts = context.normal(slices - 1)[0].tolist()

    def noise(self, ends, sigma):
        seen = set()

        def draw(number, index):
            first = number > 0 and number not in seen
            seen.add(number)
            return sigma * (self.starts[number - 1] if first else self.entries[index])

        return draw


@pytest.mark.parametrize("clipping_norm", [None, 0.02])
@pytest.mark.parametrize("risk", RISKS.values(), ids=RISKS)
def test_published_protection_agrees_with_its_reference(risk, clipping_norm):
    slices, perturbed, sizes = 6, 4, MODEL.layout.sizes
    bounds = published_bounds(np.array(risk), sizes, slices)
    public = {"slice_bounds": torch.from_numpy(bounds)}
    config = {"slices": slices, "perturbed": perturbed, "variant": "published", "clipping_norm": clipping_norm}
    context = client_context(MODEL, range(5), public=public)
    updates = draw(5, D)
    result = defense(**config).protect(updates, context)

    ends = reference.slice_ends(risk, sizes, slices)
    samples = dict(
        pair for rows, g in context.per_sample_gradients() for pair in zip(rows.tolist(), g, strict=True)
    )
    for client in range(5):
        fixed = Fixed(client, bounds.tolist(), perturbed)
        start = updates[client].numpy()
        if clipping_norm is not None:
            start = reference.clip(samples[client].numpy(), ends, fixed.chosen, clipping_norm)
        expected = reference.perturb(start, ends, fixed.chosen, fixed.noise(ends, 0.3))
        assert np.abs(result[client].numpy() - expected).max() < 1e-6


def test_published_neighbours_share_an_entry_that_is_perturbed_twice():
    context = client_context(MODEL, range(2000), size=1, public=EVEN)
    noise = defense(variant="published", perturbed=4).protect(torch.zeros(2000, D).double(), context)
    deviation = noise.std(0)
    expected = torch.full((D,), 0.3).double()
    expected[[6, 14, 21]] *= math.sqrt(2)
    assert torch.allclose(deviation, expected, rtol=0.08)


@pytest.mark.parametrize("weights", [[0.1] * 10, [0.5, 0.3, 0.2]])
def test_published_compensation_agrees_with_its_reference(weights):
    aggregate = draw(600) + torch.sin(torch.arange(600) / 50)
    published = defense(variant="published", sigma=0.2)
    scale = reference.compensation_scale(len(weights), 2, 4, 0.2, weights)
    expected = reference.denoise(aggregate.numpy(), scale, 6.0)
    for _ in range(2):  # no memory: the second round is like the first
        result = published.compensate(aggregate, server_context(weights))
        assert np.abs(result.numpy() - expected).max() < 1e-6


# --- compensation ------------------------------------------------------------------------------------------


def test_noise_in_the_aggregate_has_the_assumed_variance():
    model, weights = lenet(), torch.tensor([0.5, 0.2, 0.2, 0.1])
    bounds = torch.linspace(0, model.layout.dimension, 101).long()
    corrected = defense(slices=100, perturbed=30)
    context = client_context(model, size=1, public={"slice_bounds": bounds})
    aggregate = weights @ corrected.protect(torch.zeros(4, model.layout.dimension), context)
    assert aggregate.std().item() == pytest.approx(corrected.noise_std(weights), rel=0.05)
    assert corrected.noise_std(weights) == pytest.approx(0.3 * math.sqrt(0.3 * 0.34))


def test_published_variance_is_a_hundred_times_too_large_for_ten_clients():
    weights = torch.full((10,), 0.1)
    ratio = defense(variant="published").noise_std(weights) / defense().noise_std(weights)
    assert ratio**2 == pytest.approx(100)


def test_compensation_is_the_denoiser_at_that_variance():
    aggregate = draw(601) - 0.5
    result = defense(error_feedback=False).compensate(aggregate, server_context([0.5, 0.5]))
    assert torch.equal(result, marchenko_pastur_denoise(aggregate, 0.3 * math.sqrt(0.5 * 0.5), 6.0))
    assert torch.equal(defense(compensation="none").compensate(aggregate, server_context([1.0])), aggregate)


def test_error_feedback_loses_nothing():
    corrected, context = defense(), server_context([0.25] * 4)
    sent, applied = torch.zeros(601).double(), torch.zeros(601).double()
    for round_ in range(5):
        aggregate = (draw(601, seed=round_) - 0.5) * math.sqrt(12) * corrected.noise_std(context.client_weights)
        sent += aggregate
        applied += corrected.compensate(aggregate, context)
    removed = corrected.state_dict()["removed"]
    assert torch.allclose(applied + removed, sent)
    assert removed.norm() > 0.3 * aggregate.norm()


def test_memory_survives_a_checkpoint():
    context, first = server_context([0.25] * 4), defense()
    assert first.state_dict() == {}
    first.compensate(draw(601, seed=1) - 0.5, context)
    second = defense()
    second.load_state_dict(first.state_dict())
    aggregate = draw(601, seed=2) - 0.5
    assert torch.equal(first.compensate(aggregate, context), second.compensate(aggregate, context))


# --- preparation and settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["corrected", "published"])
def test_prepare_publishes_bounds_and_risk(variant):
    public = defense(variant=variant, compensation="none").prepare(public_context(MODEL))
    bounds = public["slice_bounds"]
    assert bounds.dtype == torch.int64 and bounds[0] == 0 and bounds[-1] == D
    assert (bounds.diff() >= 0).all() and len(bounds) == 5
    assert public["risk"].shape == (len(MODEL.layout.names),)


def test_prepare_is_a_function_of_its_generator():
    first, again = (defense().prepare(public_context(MODEL)) for _ in range(2))
    assert torch.equal(first["risk"], again["risk"])
    exact = defense(sensitivity_probes=None).prepare(public_context(MODEL))
    assert not torch.equal(first["risk"], exact["risk"])


def test_published_variant_refuses_a_model_that_it_cannot_fold():
    # d = 37 is prime.
    assert D == 37
    with pytest.raises(ConfigError, match="cannot fold 37 parameters"):
        defense(variant="published").prepare(public_context(MODEL))


def test_a_diverged_model_is_told():
    context = public_context(MODEL)
    context.weights.fill_(torch.nan)
    with pytest.raises(RunError, match="diverged"):
        defense().prepare(context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbed": 11}, r"perturbed \(11\) must not exceed slices \(10\)"),
        ({"sigma": -1}, "greater than or equal to 0"),
        ({"clipping_norm": 0}, "greater than 0"),
        ({"slices": 0}, "greater than or equal to 1"),
        ({"aspect": 0.5}, "greater than or equal to 1"),
        ({"variant": "mine"}, "'corrected' or 'published'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        GradDefenseConfig(**settings)


def test_clipping_needs_one_local_step():
    assert GradDefenseConfig(clipping_norm=1).needs_one_local_step()
    assert not GradDefenseConfig().needs_one_local_step()
