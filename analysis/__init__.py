"""Tables, figures and reports, from what MLflow holds of comparisons, sweeps and scaling studies."""
