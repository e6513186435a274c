"""Processes on machines: launching training, sharing GPUs, locking runs, ending orphaned Slurm jobs."""
