"""Evaluation of trained models: answers to benchmarks, their scores, and the bootstrap over questions."""
