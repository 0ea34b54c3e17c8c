"""Defenses: one method a file; the union below is the registry of their names."""

from typing import Annotated

from pydantic import Field

from fedsim.defenses.custom import CustomDefenseConfig
from fedsim.defenses.dp import GaussianConfig, LaplacianConfig
from fedsim.defenses.gc import GradientCompressionConfig
from fedsim.defenses.graddefense import GradDefenseConfig
from fedsim.defenses.none import NoDefenseConfig
from fedsim.defenses.pld import PLDConfig

DefenseConfig = Annotated[
    NoDefenseConfig
    | GradDefenseConfig
    | GradientCompressionConfig
    | GaussianConfig
    | LaplacianConfig
    | PLDConfig
    | CustomDefenseConfig,
    Field(discriminator="name"),
]

__all__ = [
    "CustomDefenseConfig",
    "DefenseConfig",
    "GaussianConfig",
    "GradDefenseConfig",
    "GradientCompressionConfig",
    "LaplacianConfig",
    "NoDefenseConfig",
    "PLDConfig",
]
