"""From images that a generator draws to images that it does not, as far as what was sent speaks for them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.attacks.box_adam import BoxAdam
from fedsim.attacks.distances import Distance, Targets
from fedsim.attacks.gradient_matching import GradientMatching, kept_parameters, rates_by_scale
from fedsim.attacks.labels import one_hot
from fedsim.attacks.residuals import Residuals
from fedsim.attacks.schedules import warm_cosine
from fedsim.privacy.observation import Observation, Reconstruction

WARM_UP = 10
"""Steps in which the step size rises to its full length."""


def refined(
    found: Reconstruction,
    observation: Observation,
    distance: Callable[[Targets], Distance],
    residuals: Residuals,
    prior: float,
    ignore: tuple[str, ...],
    iterations: int,
    learning_rate: float,
) -> Reconstruction:
    """Search on in pixels x from each victim's image x₀, which the residuals hold it near to.

    With D entries to match it minimises D/2 · log(distance) + prior/2 · Σ c²/variance over the frequencies c of
    x − x₀: the most probable image where Gaussian noise is of an unknown strength and images differ from what the
    generator draws as public ones do. What noise hides stays as the generator drew it; without noise the gradient
    decides alone. `loss` keeps what counted in that of `found`, and counts the residuals likewise.

    Args:
        found: The generator's images, one start a victim.
        observation: What the server saw.
        distance: The distance to match by.
        residuals: How far images are from the generator's.
        prior: Their weight.
        ignore: Parameters left out of the matching.
        iterations: Adam steps.
        learning_rate: Their largest size, in pixel units; it falls to 0 along a cosine.
    """
    search = BoxAdam(observation, 1, iterations, found.images)
    matching = GradientMatching(observation, distance, ignore)
    probabilities = one_hot(found.labels, observation.model.classes, observation.weights)
    size, start = entries(observation, ignore), search.images.clone()
    search.rates = rates_by_scale(matching, search.images, probabilities, search.victims)
    before = None
    for step in range(iterations):
        match = matching(search.images, probabilities, search.victims, search.rates)
        square, slope = residuals.penalty(search.images - start)
        before = match.loss if before is None else before
        search.note(match.loss * (prior * square / size).exp(), match.scale)
        weight = (size / 2 / match.loss.clamp_min(torch.finfo(size.dtype).tiny)).view(-1, 1, 1, 1, 1)
        slope = (weight * match.by_images).nan_to_num_().add_(slope, alpha=prior)
        search.move(slope, warm_cosine(learning_rate, step, iterations, WARM_UP))
    assert before is not None
    other = search.reconstruction(found.labels, 0.0)
    # The generator's images were matched up to `before`: what else `found.loss` counts is left as it was.
    drawn = found.loss / before.clamp_min(torch.finfo(before.dtype).tiny)
    return replace(
        other,
        loss=torch.where(before > 0, other.loss * drawn, other.loss),
        iterations=found.iterations + other.iterations,
        stalled=found.stalled & other.stalled,
    )


def entries(observation: Observation, ignore: tuple[str, ...]) -> Tensor:
    """Return how many entries of each victim's gradient are matched, [N]; one that is trusted less counts less."""
    layout = observation.model.layout
    spans = [layout.span(name) for name in kept_parameters(layout, ignore)]
    if observation.trust is None:
        count = sum(span.stop - span.start for span in spans)
        return torch.full_like(observation.gradients[:, 0], count, dtype=observation.weights.dtype)
    trust = torch.cat([observation.trust[:, span] for span in spans], 1).to(observation.weights)
    return (trust.sum(1) / trust.amax(1).clamp_min(torch.finfo(trust.dtype).tiny)).clamp_min(1)
