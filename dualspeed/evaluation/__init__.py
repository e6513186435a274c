"""Answers to benchmarks, their scores, and the bootstrap over questions."""
