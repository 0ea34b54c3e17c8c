"""Find a user's own class or function from a `module:attribute` text."""

import importlib
from typing import Any

from fedsim.errors import ConfigError


def load_attribute(target: str) -> Any:
    """Import `module:attribute`.

    Raises:
        ConfigError: If the text is malformed, the module cannot be imported or has no such attribute.
    """
    module_name, separator, attribute = target.partition(":")
    if not (module_name and separator and attribute):
        raise ConfigError(f"{target!r} does not name anything: write it as module:attribute")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"cannot import {module_name!r} for {target!r}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ConfigError(f"module {module_name!r} has no attribute {attribute!r}") from None
