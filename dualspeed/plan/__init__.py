"""Cost of a sheet of experiments before any of it runs, by arithmetic.

Input: a configuration. Output: samples, tokens, FLOPs, memory, hours and disk of each row's stages. Without torch:
sizes come from the models' configuration files, lengths from prepared data if there is any.
"""
