"""Figures of a sheet."""
