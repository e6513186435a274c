"""Built-in demo: scenes of handwritten digits, questions about them, and a tiny model to train on both."""
