import itertools

import pytest
import torch
from torch.nn import functional as F

from fedsim.defenses import sensitivity
from fedsim.defenses.sensitivity import frobenius_risk, published_risk
from tests.defenses import published_reference
from tests.defenses.defense_cases import lenet, public_context, tiny_model


def dense_jacobian(context, images, labels):
    """∂g/∂x of the mean gradient of a batch, shape [d, values of the batch]."""

    def gradient(images):
        weights = context.weights.clone().requires_grad_()
        loss = F.cross_entropy(context.model.logits(weights, images), labels)
        return torch.autograd.grad(loss, weights, create_graph=True)[0]

    return torch.autograd.functional.jacobian(gradient, images).flatten(1)


def norms(context, jacobian):
    return torch.stack([part.norm() for part in jacobian.split(context.model.layout.sizes)])


def test_exact_risk_is_the_mean_frobenius_norm_of_single_images():
    context = public_context(tiny_model())
    pairs = zip(context.root_images.split(1), context.root_labels.split(1), strict=True)
    expected = torch.stack([norms(context, dense_jacobian(context, *pair)) for pair in pairs]).mean(0)
    assert torch.allclose(frobenius_risk(context, None), expected, rtol=1e-10)


def test_exact_risk_of_a_batch_norm_model_takes_the_batch():
    context = public_context(tiny_model(batch_norm=True), size=6)
    jacobian = dense_jacobian(context, context.root_images, context.root_labels)
    assert torch.allclose(frobenius_risk(context, None), 6**0.5 * norms(context, jacobian), rtol=1e-10)


def test_root_set_is_cut_into_batches_for_batch_norm(monkeypatch):
    monkeypatch.setattr(sensitivity, "BATCH_NORM_BATCH", 4)
    context = public_context(tiny_model(batch_norm=True), size=9)
    images, labels = sensitivity._units(context)
    assert images.shape == (2, 4, 1, 3, 3) and labels.shape == (2, 4)
    used = {tuple(image.flatten().tolist()) for image in images.flatten(0, 1)}
    assert len(used) == 8 and used <= {tuple(i.flatten().tolist()) for i in context.root_images}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_all_sign_vectors_together_give_the_exact_norm(batch_norm, monkeypatch):
    """The mean over every sign vector is the expectation of the estimator: it has no bias."""
    context = public_context(tiny_model(batch_norm), size=1)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)), dtype=torch.float64)
    block = signs.view(1, -1, 1, 1, 3, 3) / len(signs) ** 0.5
    monkeypatch.setattr(sensitivity, "_signs", lambda *_: iter([block]))
    assert torch.allclose(frobenius_risk(context, 512), frobenius_risk(context, None), rtol=1e-9)


@pytest.mark.parametrize(("batch_norm", "probes"), [(False, 300), (True, 900)])
def test_probes_approach_the_exact_risk(batch_norm, probes):
    context = public_context(tiny_model(batch_norm), size=6)
    exact = frobenius_risk(context, None)
    assert torch.allclose(frobenius_risk(context, probes), exact, rtol=0.04)


def test_chunks_do_not_change_the_risk(monkeypatch):
    context = public_context(tiny_model(), size=6)
    whole = frobenius_risk(context, None)
    monkeypatch.setattr(sensitivity, "PER_SAMPLE_BYTES", 1)
    assert torch.allclose(frobenius_risk(context, None), whole, rtol=1e-12)


def test_two_probes_tell_the_shares_of_a_lenet():
    model = lenet()
    exact = frobenius_risk(public_context(model, size=4), None)
    estimate = frobenius_risk(public_context(model, size=4), 2)
    assert (estimate / estimate.sum() - exact / exact.sum()).abs().max() < 0.02


@pytest.mark.parametrize("batch_norm", [False, True])
def test_published_risk_agrees_with_its_reference(batch_norm):
    context = public_context(tiny_model(batch_norm), size=5)
    layout = context.model.layout
    parameters = [p.clone().requires_grad_() for p in layout.views(context.weights).values()]

    def logits(parameters, images):
        return context.model.logits(torch.cat([p.reshape(-1) for p in parameters]), images)

    expected = published_reference.sensitivity(logits, parameters, context.root_images, context.root_labels)
    expected = torch.tensor(expected, dtype=torch.float64)
    risk = published_risk(context)
    assert torch.allclose(risk, expected, rtol=1e-6, atol=1e-12 * float(expected.max()))


def test_published_risk_overlooks_the_last_layer():
    context = public_context(lenet(), size=10)
    wrong, right = published_risk(context), frobenius_risk(context, 2)
    assert right.argmax() == 6 and wrong[6] < 1e-6 * wrong.max()


def test_published_risk_works_where_gradients_are_switched_off():
    context = public_context(tiny_model())
    with torch.no_grad():
        assert torch.isfinite(published_risk(context)).all()
