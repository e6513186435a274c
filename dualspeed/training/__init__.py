"""The trainer, and one stage of a run."""
