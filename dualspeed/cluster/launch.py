"""Training in several processes: `accelerate launch` on each node, which `srun` starts if there are several nodes.

A Slurm job has one task on each node; the task spawns the node's training processes.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ON_NODE = "DUALSPEED_ON_NODE"  # set for the processes that srun starts
PORTS = range(20000, 30000)


def must_launch(nodes: int, processes: int, accelerate_config: str | None) -> bool:
    """True if this process should start the training processes rather than train itself."""
    return "RANK" not in os.environ and (nodes * processes > 1 or accelerate_config is not None)


def launch(
    arguments: list[str], nodes: int, processes: int, cpus: int, accelerate_config: str | None = None
) -> NoReturn:
    """Replace this process by the command that runs `dualspeed` with these `arguments` in all training processes.

    Args:
        nodes: nodes of this Slurm job; with 1, Slurm isn't needed.
        processes: training processes on each node.
        cpus: CPU cores on each node.
        accelerate_config: file that `accelerate config` writes, for DeepSpeed or FSDP; None: DDP.
    """
    if nodes > 1 and ON_NODE not in os.environ:
        os.environ[ON_NODE] = "1"
        _become(["srun", *srun_options(nodes, cpus), sys.executable, "-m", "dualspeed.cli", *arguments])
    os.environ["OMP_NUM_THREADS"] = str(max(1, cpus // processes))
    command = accelerate_command(nodes, processes, accelerate_config)
    _become([sys.executable, "-m", *command, "-m", "dualspeed.cli", *arguments])


def srun_options(nodes: int, cpus: int) -> list[str]:
    """Options of `srun`: one task on each node with all its cores; a failed task ends the others."""
    tasks = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    return [*tasks, "--kill-on-bad-exit=1", "--label"]


def accelerate_command(nodes: int, processes: int, accelerate_config: str | None) -> list[str]:
    """Command line of `accelerate launch` on this node, without the program that it starts."""
    command = ["accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", accelerate_config] if accelerate_config else ["--mixed_precision=no"]
    if not accelerate_config and nodes * processes > 1:
        command.append("--multi_gpu")  # on CPUs too: without it, accelerate would need MPI to spawn processes
    command += [f"--num_processes={nodes * processes}", f"--num_machines={nodes}", "--dynamo_backend=no"]
    if nodes > 1:
        command += [f"--machine_rank={os.environ['SLURM_NODEID']}", f"--main_process_ip={_first_address()}"]
    return [*command, f"--main_process_port={_port(nodes)}"]


def _first_address() -> str:
    """Address of the job's first node, which may differ from the node's name."""
    first = _scontrol("hostnames", os.environ["SLURM_STEP_NODELIST"]).split()[0]
    return re.findall(r"NodeAddr=(\S+)", _scontrol("node", first))[0]


def _scontrol(*what: str) -> str:
    return subprocess.run(["scontrol", "show", *what], check=True, capture_output=True, text=True).stdout


def _port(nodes: int) -> int:
    if nodes > 1:  # all nodes must use the same port
        return PORTS[int(os.environ["SLURM_JOB_ID"]) % len(PORTS)]
    with socket.socket() as free:  # jobs that share this machine need different ports
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _become(command: list[str]) -> NoReturn:
    program = shutil.which(command[0]) or command[0]
    sys.stdout.flush()
    os.execv(program, [str(Path(program)), *command[1:]])
