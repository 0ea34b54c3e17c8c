"""No defense: the ceiling that every other row of a table is compared with."""

from typing import Literal

from fedsim.defenses.base import Defense, DefenseSettings


class NoDefenseConfig(DefenseSettings):
    """Clients send their updates as they are."""

    name: Literal["none"] = "none"

    def build(self) -> Defense:
        """Return the identity."""
        return Defense()
