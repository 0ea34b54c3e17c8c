"""The audit: observations, metrics, scores."""
