"""Training data: LLaVA conversations and their images become a prepared dataset, and its rows become batches."""
