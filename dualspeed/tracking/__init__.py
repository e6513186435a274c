"""Metrics: a local file first, MLflow second."""
