"""Attacks."""

from fedsim.attacks.base import AttackSettings

AttackConfig = AttackSettings
