"""The embedded demo: scenes of real handwritten digits, questions about them, and a tiny model to train on both."""
