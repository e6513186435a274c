"""What a sheet of experiments would cost, by arithmetic, before any of it runs.

Enters: a configuration. Leaves: samples, tokens, FLOPs, memory, hours and disk of each row's stages. No torch: sizes
come from the models' configuration files, lengths from prepared data where it is there.
"""
