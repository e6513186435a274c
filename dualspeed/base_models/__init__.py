"""Base models put together from parts, with the Hub's parameter names."""
