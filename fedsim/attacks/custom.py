"""An attack of the user's own, named in a config."""

import inspect
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fedsim.attacks.base import Attack, AttackSettings
from fedsim.errors import ConfigError
from fedsim.plugins import load_attribute


class CustomAttackConfig(AttackSettings):
    """An attack of your own: `factory` names a class, or any callable, that returns an `Attack`."""

    name: Literal["custom"] = "custom"
    factory: str
    """`module:Class`; it gets `options` as keyword arguments."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments handed to the factory."""
    needs_labels: bool = False
    """Whether the attack is told the victims' labels."""

    @model_validator(mode="after")
    def _only_options(self) -> Self:
        for name in ("restarts", "ignore"):
            # A config that fedsim has written names every setting.
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: an attack of your own gets what is under `options`; put it there")
        return self

    @property
    def knows_labels(self) -> bool:
        """Return what the user declared."""
        return self.needs_labels

    @property
    def takes_strategies(self) -> bool:
        """An attack of a user's own need not know of trust and distances."""
        return False

    def build(self) -> Attack:
        """Call the factory.

        Raises:
            ConfigError: If the factory cannot be found, does not take `options`, or returns no `Attack`.
        """
        factory = load_attribute(self.factory)
        if not callable(factory):
            raise ConfigError(f"attack.factory: {self.factory} is no class or function")
        try:
            inspect.signature(factory).bind(**self.options)
        except TypeError as error:
            raise ConfigError(f"attack.options: {self.factory} does not take them: {error}") from None
        attack = factory(**self.options)
        if not isinstance(attack, Attack):
            raise ConfigError(f"attack.factory: {self.factory} returned {type(attack).__name__}, not an Attack")
        return attack
