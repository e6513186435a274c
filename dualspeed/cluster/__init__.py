"""Processes, GPUs, locks and scheduler jobs."""
