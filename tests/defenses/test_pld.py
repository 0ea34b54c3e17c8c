import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedsim.defenses import pld
from fedsim.defenses.pld import PLDConfig, exact_norms, probed_norms
from tests.defenses.defense_cases import batch_group, client_context, draw, lenet, public_context, tiny_model

BATCH_NORM = pytest.mark.parametrize("batch_norm", [False, True])
PUBLIC = {"probe_seed": torch.tensor([11])}


def dense_norms(model, weights, images):
    """‖∂r_sf/∂x‖ from the dense Jacobian of the whole batch; without batch norm only x_s matters."""
    jacobian = torch.autograd.functional.jacobian(lambda x: model.representation(weights, x), images)
    return jacobian.flatten(2).norm(dim=2)


def split(model, protected):
    """The defended layer's weight gradient [K, out, in], and everything else [K, rest]."""
    views = model.layout.views(protected)
    rest = [view.flatten(1) for name, view in views.items() if name != f"{model.first_linear}.weight"]
    return views[f"{model.first_linear}.weight"], torch.cat(rest, dim=1)


@BATCH_NORM
def test_exact_norms_are_those_of_the_dense_jacobian(batch_norm):
    model = tiny_model(batch_norm)
    weights, images = model.initial_weights(), draw(4, 1, 3, 3)
    representation, norms = exact_norms(model, weights, images)
    assert torch.equal(representation, model.representation(weights, images))
    assert torch.allclose(norms, dense_norms(model, weights, images), rtol=1e-12)


def test_exact_norms_do_not_depend_on_the_block(monkeypatch):
    model = tiny_model()
    images = draw(4, 1, 3, 3)
    whole = exact_norms(model, model.initial_weights(), images)[1]
    monkeypatch.setattr(pld, "PASS_VALUES", 1)
    assert torch.allclose(exact_norms(model, model.initial_weights(), images)[1], whole, rtol=1e-12)


@BATCH_NORM
def test_an_orthogonal_set_of_probes_gives_the_exact_norms(batch_norm):
    model = tiny_model(batch_norm)
    weights, images = model.initial_weights(), draw(2, 4, 1, 3, 3)
    if batch_norm:
        probes = 6 * torch.eye(36).double().view(36, 4, 1, 3, 3)
    else:
        probes = 3 * torch.eye(9).double().view(9, 1, 1, 3, 3).expand(-1, 4, -1, -1, -1)
    representation, norms = probed_norms(model, weights, images, probes)
    for client in range(2):
        expected = exact_norms(model, weights, images[client])
        assert torch.allclose(representation[client], expected[0], rtol=1e-12)
        assert torch.allclose(norms[client], expected[1], rtol=1e-10)


@BATCH_NORM
def test_random_probes_approach_the_exact_norms(batch_norm):
    model = tiny_model(batch_norm)
    images = draw(1, 4, 1, 3, 3)
    probes = torch.randn(4000, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    norms = probed_norms(model, model.initial_weights(), images, probes)[1]
    exact = exact_norms(model, model.initial_weights(), images[0])[1]
    assert torch.allclose(norms[0], exact, rtol=0.06)


@pytest.mark.parametrize("prune", [0.01, 0.3, 0.6, 0.99])
def test_columns_below_the_percentile_of_the_scores_are_zeroed_and_nothing_else(prune):
    model = tiny_model()
    context = client_context(model)
    updates = draw(4, model.layout.dimension) + 1
    weight, rest = split(model, PLDConfig(prune=prune, scores="exact").build().protect(updates, context))
    original, untouched = split(model, updates)
    assert torch.equal(rest, untouched)
    for row, images in enumerate(context.batches[0].images):
        features = model.representation(context.weights, images)
        norms = dense_norms(model, context.weights, images)
        scores = (norms / (features.abs() + 0.1)).mean(0).numpy()
        keep = torch.from_numpy(scores >= np.percentile(scores, 100 * prune))
        assert torch.equal(weight[row], original[row] * keep)


def test_published_seed_decides_the_probes():
    model = lenet()
    updates = torch.ones(2, model.layout.dimension)
    defense = PLDConfig(prune=0.6, probes=1).build()

    def protect(seed):
        context = client_context(model, range(2), size=2, public={"probe_seed": torch.tensor(seed)})
        return defense.protect(updates, context)

    assert torch.equal(protect(1), protect(1))
    assert not torch.equal(protect(1), protect(2))
    assert defense.prepare(public_context(model))["probe_seed"].dtype == torch.int64


def test_mask_is_the_clients_own_whatever_its_chunk(monkeypatch):
    model = lenet()
    updates = torch.ones(3, model.layout.dimension)
    defense = PLDConfig(prune=0.6, probes=1).build()
    together = defense.protect(updates, client_context(model, [3, 7, 1], size=2, public=PUBLIC))
    alone = defense.protect(updates[:1], client_context(model, [7], size=2, public=PUBLIC))
    assert torch.equal(together[1], alone[0])
    monkeypatch.setattr(pld, "PASS_VALUES", 1)
    one_by_one = defense.protect(updates, client_context(model, [3, 7, 1], size=2, public=PUBLIC))
    assert torch.equal(one_by_one, together)


def test_clients_with_batches_of_different_sizes():
    model = tiny_model()
    groups = [batch_group(model, [0, 2], 3), batch_group(model, [1], 5)]
    context = client_context(model, range(3), groups=groups, public=PUBLIC)
    updates = torch.ones(3, model.layout.dimension).double()
    mixed = PLDConfig(prune=0.5, scores="exact").build().protect(updates, context)
    assert (split(model, mixed)[0][:, 0] == 0).sum(1).tolist() == [4, 4, 4]
    for group in groups:
        for row, images, labels in zip(group.rows, group.images, group.labels, strict=True):
            single = pld.ClientContext(
                model, context.weights, [type(group)(torch.tensor([0]), images[None], labels[None])], [], PUBLIC
            )
            alone = PLDConfig(prune=0.5, scores="exact").build().protect(updates[:1], single)
            assert torch.equal(mixed[row], alone[0])


def test_default_probes_find_nine_of_ten_features_of_a_lenet():
    model = lenet()
    context = client_context(model, [0], size=32, public=PUBLIC)
    updates = torch.ones(1, model.layout.dimension)
    estimated = split(model, PLDConfig().build().protect(updates, context))[0][0, 0] == 0
    exact = split(model, PLDConfig(scores="exact").build().protect(updates, context))[0][0, 0] == 0
    assert estimated.sum() == exact.sum() == 353
    assert (estimated & exact).sum() >= 0.9 * 353


@BATCH_NORM
def test_prune_zero_is_the_identity(batch_norm):
    model = tiny_model(batch_norm)
    updates = draw(4, model.layout.dimension)
    protected = PLDConfig(prune=0).build().protect(updates, client_context(model, public=PUBLIC))
    assert torch.equal(protected, updates)


@pytest.mark.parametrize("settings", [{"prune": 1}, {"prune": -0.1}, {"probes": 0}, {"scores": "guess"}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        PLDConfig(**settings)
