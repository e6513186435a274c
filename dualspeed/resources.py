"""What the jobs of a model ask a scheduler for: no setting of training, so a changed one runs nothing again."""

from dataclasses import dataclass

from dualspeed.typed import check_range


@dataclass(frozen=True, kw_only=True)
class JobResources:
    """Resources of one kind of job; all but `nodes` count on each node."""

    nodes: int = 1
    """Machines that train together."""
    gpu: int | None = None
    """GPUs; null: one, or none where the recipe says `use_cpu`."""
    processes: int | None = None
    """Training processes; null: one for each GPU."""
    cpus: int = 1
    """CPU cores."""
    mem_mb: int = 8000
    """Memory."""
    runtime: int = 1440
    """Longest time in minutes. Training ends in time with a checkpoint, and its retry goes on there."""
    partition: str | None = None
    """Slurm's partition; null: the profile's, or the cluster's default."""
    account: str | None = None
    """Slurm's account; null: the profile's, or the cluster's default."""

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus", "mem_mb", "runtime"):
            check_range(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        check_range("gpu", self.gpu or 0, (self.gpu or 0) >= 0, "0 or more, or null")
        check_range("processes", self.processes or 0, self.processes is None or self.processes > 0, "above 0, or null")


@dataclass(frozen=True, kw_only=True)
class ModelResources:
    """Resources of a model's jobs."""

    pretrain: JobResources = JobResources()
    """Its pretrainings."""
    finetune: JobResources = JobResources()
    """Its finetunings."""
    answer: JobResources = JobResources()
    """Answering the benchmarks, on one node and one GPU."""
    speed: JobResources = JobResources()
    """Timing its steps, on one node and one GPU."""
