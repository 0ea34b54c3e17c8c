"""The base of every configuration model, and how its errors are told to a person."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a name that becomes a folder's may be."""
NAME_IN_WORDS = "letters, digits, '.', '_' and '-', the first a letter or digit"


class Schema(BaseModel):
    """Strict about names, immutable once read; every field carries its own documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name in data:
                if name not in cls.model_fields:
                    hint = suggest(str(name), cls.model_fields)
                    raise PydanticCustomError("unknown_setting", "unknown setting {name}", {"name": hint})
        return data


def suggest(wrong: str, valid: Iterable[str]) -> str:
    """Return `wrong` quoted, with the nearest valid name and the list of them all."""
    names = sorted(valid)
    close = get_close_matches(wrong, names, n=1)
    nearest = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{wrong!r}{nearest} valid: {', '.join(names)}"


def explain(error: ValidationError, data: Any) -> str:
    """Put the first problem of a failed validation into one line: dotted path, what is wrong, what was given.

    Args:
        error: What pydantic raised.
        data: The input that was validated, which tells settings from the tags that pydantic adds to paths.
    """
    problems = error.errors()
    first = problems[0]
    path = dotted(first["loc"], data)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path}: {_message(first)}{more}" if path else _message(first) + more


def _message(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "union_tag_invalid":
        valid = [name.strip().strip("'") for name in context["expected_tags"].split(",")]
        return f"unknown name {suggest(str(context['tag']), valid)}"
    if kind == "union_tag_not_found":
        return "needs a name"
    if kind == "unknown_setting":
        return str(problem["msg"])
    if kind == "model_attributes_type" and isinstance(problem["input"], str):  # one of several, told by its name
        return f"needs settings, as in {{name: {problem['input']}}}, got {problem['input']!r}"
    if kind == "model_type":
        return f"needs settings, got {problem['input']!r}"
    if kind in ("tuple_type", "list_type") and isinstance(problem["input"], str):
        return f"needs a list, as in [{problem['input']}], got {problem['input']!r}"
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME:
        return f"{NAME_IN_WORDS}, got {problem['input']!r}"
    text = str(problem["msg"]).removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    given = problem["input"]
    return text if isinstance(given, Mapping) else f"{text}, got {given!r}"


def dotted(location: Sequence[int | str], data: Any) -> str:
    """Turn a pydantic location into the dotted path a user writes, without the union tags in it."""
    parts: list[str] = []
    node = data
    for part in location:
        if isinstance(node, Mapping) and part not in node and node.get("name") == part:
            continue
        parts.append(str(part))
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return ".".join(parts)
