"""From images of few unknowns to images of one unknown a pixel, where what was sent justifies them."""

from dataclasses import replace

import torch
from torch import Tensor

from fedsim.attacks.gia import GIA
from fedsim.attacks.gradient_matching import kept_parameters, loss_at
from fedsim.privacy.observation import Observation, Reconstruction


def refined(found: Reconstruction, observation: Observation, pixels: GIA, unknowns: int) -> Reconstruction:
    """Search on in pixels from each victim's image, and keep the outcome where `justified`.

    Args:
        found: Images of `unknowns` unknowns a victim.
        observation: What the server saw.
        pixels: The search, of one start a victim.
        unknowns: How many were searched for so far.
    """
    search = pixels.search(observation, found.labels, found.images)
    other = search.reconstruction(found.labels, 0.0)
    ignore = pixels.settings.ignore
    before, after = (
        loss_at(observation, pixels.distance, ignore, one.images, one.labels) for one in (found, other)
    )
    kept = justified(before, after, entries(observation, ignore), found.images[0].numel() - unknowns)
    # What else counts in the loss is left as it was, so that it can still be compared with that at the truth.
    other = replace(other, loss=found.loss * after / before.clamp_min(torch.finfo(before.dtype).tiny))
    return replace(_either(kept, other, found), iterations=found.iterations + other.iterations)


def justified(before: Tensor, after: Tensor, entries: Tensor, more: int) -> Tensor:
    """Return where `more` unknowns are worth a distance that falls from `before` to `after`, each [N], bool.

    With D `entries` [N] to match, D · log(before / after) > more · log D.

    Source: Schwarz, "Estimating the Dimension of a Model", Annals of Statistics 6, 1978.
    """
    tiny = torch.finfo(before.dtype).tiny
    gain = before.clamp_min(tiny).log() - after.clamp_min(tiny).log()
    return entries * gain > more * entries.log()


def entries(observation: Observation, ignore: tuple[str, ...]) -> Tensor:
    """Return how many entries of each victim's gradient are matched, [N]; one that is trusted less counts less."""
    layout = observation.model.layout
    spans = [layout.span(name) for name in kept_parameters(layout, ignore)]
    if observation.trust is None:
        count = sum(span.stop - span.start for span in spans)
        return torch.full_like(observation.gradients[:, 0], count, dtype=observation.weights.dtype)
    trust = torch.cat([observation.trust[:, span] for span in spans], 1).to(observation.weights)
    return (trust.sum(1) / trust.amax(1).clamp_min(torch.finfo(trust.dtype).tiny)).clamp_min(1)


def _either(where: Tensor, one: Reconstruction, other: Reconstruction) -> Reconstruction:
    """Return, victim by victim, `one` where `where` [N] holds, and `other` elsewhere."""

    def pick(name: str) -> Tensor:
        mine, theirs = getattr(one, name), getattr(other, name)
        return torch.where(where.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

    return replace(
        other,
        images=pick("images"),
        loss=pick("loss"),
        stalled=pick("stalled"),
        exhausted=pick("exhausted"),
        learning_rates=None if one.learning_rates is None else pick("learning_rates"),
    )
