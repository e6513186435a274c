"""Every setting, checked before anything runs; imports no torch."""
