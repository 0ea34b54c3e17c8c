"""Settings as plain data, before any schema checks them: YAML files, `key=value` texts, layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; ConfigError names the file and the line."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected settings (key: value), found {type(data).__name__}")
    return data


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay `over` upon `base`: mappings merge, all else replaces, and another `name` starts a mapping afresh."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if not (isinstance(value, dict) and isinstance(old, dict)):
            result[key] = value
        elif "name" in value and value["name"] != old.get("name"):
            result[key] = value
        else:
            result[key] = merged(old, value)
    return result


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` texts with dotted keys into nested settings; values are read as YAML."""
    result: dict[str, Any] = {}
    for text in overrides:
        path, separator, value = text.partition("=")
        if not separator or not all(path.split(".")):
            raise ConfigError(f"{text!r}: overrides are written key=value, e.g. defense.sigma=0.1")
        try:
            leaf = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r}: the value is not valid YAML: {' '.join(str(error).split())}") from None
        for part in reversed(path.split(".")):
            leaf = {part: leaf}
        result = merged(result, leaf)
    return result
