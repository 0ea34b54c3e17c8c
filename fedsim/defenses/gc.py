"""Gradient compression: only the largest entries of each layer are sent."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from fedsim.defenses.base import ClientContext, Defense, DefenseSettings
from fedsim.defenses.pruning import count_nonzero, keep_largest

INDEX_BYTES = 4


class GradientCompressionConfig(DefenseSettings):
    """Keep the largest entries of each layer's update and zero the rest."""

    name: Literal["gc"] = "gc"
    prune: float = Field(default=0.7, ge=0, lt=1)
    """Fraction of each parameter tensor's entries that is zeroed, smallest magnitude first."""

    def build(self) -> "GradientCompression":
        """Return the defense."""
        return GradientCompression(self)

    def strategies(self) -> tuple[str, ...]:
        """The zeros in the observation tell what was pruned, so there is nothing more to tell an oracle."""
        return ("survivors", "thresholds", "pruned")


class GradientCompression(Defense):
    """Zeroes the entries below each parameter's quantile of magnitudes.

    Source: Lin et al., "Deep Gradient Compression", ICLR 2018, as a defense in Zhu et al., "Deep Leakage from
    Gradients", NeurIPS 2019, section 5.2; without their accumulation of what was left out, like the codes
    that compare with it.
    """

    def __init__(self, settings: GradientCompressionConfig) -> None:
        """Take the settings."""
        self.prune = settings.prune

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        """Return `updates` [K, d] with the smallest entries of each parameter zeroed; ties are kept."""
        return keep_largest(updates, context.model.layout.sizes, self.prune)

    def upload_bytes(self, protected: Tensor) -> Tensor:
        """Bytes of the entries that are not zero, plus their indices or a bit mask, whichever is less."""
        kept = count_nonzero(protected)
        mask = -(-protected.shape[1] // 8)
        return (kept * protected.element_size() + (kept * INDEX_BYTES).clamp(max=mask)).float()
