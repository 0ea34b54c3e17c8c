"""Tables, figures and the report of a comparison, from what MLflow holds of it."""
