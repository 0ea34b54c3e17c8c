"""Tables, figures and the report of a comparison, from what MLflow holds of it."""

from analysis.write import write_all

__all__ = ["write_all"]
