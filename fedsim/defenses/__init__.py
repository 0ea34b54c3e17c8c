"""Defenses."""
from fedsim.defenses.none import NoDefenseConfig
DefenseConfig = NoDefenseConfig
