"""The base of every configuration model."""

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """Strict about names, immutable once read; every field carries its own documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
