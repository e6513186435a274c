"""Resources that a model's jobs ask a scheduler for; no result depends on them, so a change runs nothing again."""

import dataclasses
import shlex
from dataclasses import dataclass, field

from dualspeed.settings.fields import check_fields, number


@dataclass(frozen=True, kw_only=True)
class JobResources:
    """Resources of one kind of job; all but `nodes` count on each node."""

    nodes: int = number(above=0, default=1)
    """Machines that train together."""
    gpu: int | None = number(minimum=0, default=None)
    """GPUs; null: one, or none where the recipe says `use_cpu`."""
    processes: int | None = number(above=0, default=None)
    """Training processes; null: one for each GPU."""
    cpus: int = number(above=0, default=1)
    """CPU cores."""
    mem_mb: int = number(above=0, default=8000)
    """Memory."""
    runtime: int = number(above=0, default=1440)
    """Longest time in minutes. Training ends in time with a checkpoint, and its retry goes on there."""
    partition: str | None = None
    """Slurm's partition; null: the profile's, or the cluster's default."""
    account: str | None = None
    """Slurm's account; null: the profile's, or the cluster's default."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def num_processes(self) -> int:
        """Processes that train together, over all nodes; one on each node while `processes` is null."""
        return self.nodes * (self.processes or 1)

    def resolved(self, use_cpu: bool) -> "JobResources":
        """With a number for each null but partition and account; `use_cpu`: the recipe trains on the CPU."""
        gpu = self.gpu if self.gpu is not None else int(not use_cpu)
        return dataclasses.replace(self, gpu=gpu, processes=self.processes or max(1, gpu))

    def asked(self) -> dict[str, int | str]:
        """Resources of a rule in the Slurm plugin's names; `gpu` is over all nodes, the others are of each."""
        resources = {
            "nodes": self.nodes,
            "gpu": self.nodes * (self.gpu or 0),
            "mem_mb": self.mem_mb,
            "runtime": self.runtime,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
        }
        if self.nodes > 1:
            # One task on each node, which starts the processes there (dualspeed.cluster.launch): by default the plugin
            # runs a job on one node, and asks for as many tasks on a GPU as there are in all.
            extra = "--ntasks-per-node=1" + (f" --gpus-per-node={self.gpu}" if self.gpu else "")
            resources |= {"mpi": "srun", "tasks": self.nodes, "tasks_per_gpu": 0, "slurm_extra": extra}
        return {name: value for name, value in resources.items() if value is not None}

    def launch_options(self, accelerate_config: str | None) -> str:
        """Options of `dualspeed train` that say how many processes train together."""
        options = f"--nodes {self.nodes} --processes {self.processes} --cpus {self.cpus}"
        return options + (f" --accelerate-config {shlex.quote(accelerate_config)}" if accelerate_config else "")

    def share_options(self, accelerate_config: str | None) -> str:
        """Options of `dualspeed speed` that say what share of such a training one process has."""
        return f"--processes {self.num_processes}" + (" --sharded" if accelerate_config else "")


@dataclass(frozen=True, kw_only=True)
class ModelResources:
    """Resources of a model's jobs."""

    pretrain: JobResources = field(default_factory=JobResources)
    """Its pretrainings."""
    finetune: JobResources = field(default_factory=JobResources)
    """Its finetunings."""
    answer: JobResources = field(default_factory=JobResources)
    """Answering the benchmarks, on one node and one GPU."""
    speed: JobResources = field(default_factory=JobResources)
    """Timing its steps, on one node and one GPU."""
