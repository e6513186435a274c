"""Metrics of jobs: written to a local file, then delivered to MLflow."""
