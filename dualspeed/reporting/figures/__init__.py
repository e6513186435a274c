"""Figures of a sheet, and of the tokens that pruners keep."""
