"""Training data: from LLaVA conversations and their images to a prepared dataset, and from its rows to batches."""
