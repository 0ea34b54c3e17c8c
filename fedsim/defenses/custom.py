"""A defense of the user's own, named in a config."""

import inspect
from typing import Any, Literal

from pydantic import Field

from fedsim.defenses.base import Defense, DefenseSettings
from fedsim.errors import ConfigError
from fedsim.plugins import load_attribute


class CustomDefenseConfig(DefenseSettings):
    """A defense of your own: `factory` names a class, or any callable, that returns a `Defense`."""

    name: Literal["custom"] = "custom"
    factory: str
    """`module:Class`; it gets `options` as keyword arguments."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments handed to the factory."""
    one_local_step: bool = False
    """Whether the defense is defined for one local step only."""

    def build(self) -> Defense:
        """Call the factory.

        Raises:
            ConfigError: If the factory cannot be found, does not take `options`, or returns no `Defense`.
        """
        factory = load_attribute(self.factory)
        if not callable(factory):
            raise ConfigError(f"defense.factory: {self.factory} is no class or function")
        try:
            inspect.signature(factory).bind(**self.options)
        except TypeError as error:
            raise ConfigError(f"defense.options: {self.factory} does not take them: {error}") from None
        defense = factory(**self.options)
        if not isinstance(defense, Defense):
            raise ConfigError(f"defense.factory: {self.factory} returned {type(defense).__name__}, not a Defense")
        return defense

    def needs_one_local_step(self) -> bool:
        """Return what the user declared."""
        return self.one_local_step
