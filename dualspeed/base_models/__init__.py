"""Base models assembled from a language model and a vision tower, with the Hub's parameter names."""
