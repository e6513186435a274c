"""Training of one stage: the trainer, its checkpoints and what it logs."""
