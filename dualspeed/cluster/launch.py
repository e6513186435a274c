"""Training in several processes: `accelerate launch` on each node, which `srun` starts if there are several nodes.

A Slurm job has one task on each node; the task spawns the node's training processes. Without Slurm the same command is
started on each node, by hand or by another scheduler, and is told the node's number and where the first node is.
"""

import argparse
import atexit
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dualspeed.errors import ConfigError
from dualspeed.programs import run_program

ON_NODE = "DUALSPEED_ON_NODE"  # set for the processes that srun starts
PORTS = range(20000, 30000)
DEFAULT_PORT = 29500  # torchrun's


@dataclass(frozen=True)
class Place:
    """Place of this node among several, and where the first of them is."""

    rank: int
    address: str
    port: int


def add_hosts(command: argparse.ArgumentParser) -> None:
    """Give a command the options that tell a node its place where Slurm doesn't."""
    command.add_argument("--node-rank", type=int, help="number of this node, from 0, without Slurm; or NODE_RANK")
    command.add_argument("--main-address", help="address of node 0, without Slurm; or MASTER_ADDR")
    command.add_argument("--main-port", type=int, help=f"free port of node 0; or MASTER_PORT; default {DEFAULT_PORT}")


def place_of(options: argparse.Namespace) -> Place | None:
    """Place of this node by the options, else by torchrun's variables; None: one node, or Slurm knows.

    Raises:
        ConfigError: a job of several nodes without Slurm lacks a part of it, or has an impossible one.
    """
    is_told = options.node_rank is not None or options.main_address is not None
    if options.nodes == 1 or (not is_told and "SLURM_JOB_ID" in os.environ):
        return None
    rank = os.environ.get("NODE_RANK", "") if options.node_rank is None else str(options.node_rank)
    port = os.environ.get("MASTER_PORT", str(DEFAULT_PORT)) if options.main_port is None else str(options.main_port)
    address = options.main_address or os.environ.get("MASTER_ADDR", "")
    if not (rank.isdecimal() and int(rank) < options.nodes):
        raise ConfigError(
            f"--node-rank (or NODE_RANK) is {rank or 'not given'}; valid in a job of {options.nodes} nodes without "
            f"Slurm: 0 to {options.nodes - 1}, another on each node"
        )
    if not address:
        raise ConfigError("--main-address (or MASTER_ADDR) is not given; valid: the address of node 0, on all nodes")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"--main-port (or MASTER_PORT) is {port}; valid: a free port of node 0, the same on all nodes"
        )
    return Place(int(rank), address, int(port))


def must_launch(nodes: int, processes: int, accelerate_config: str | None) -> bool:
    """True if this process should start the training processes rather than train itself."""
    return "RANK" not in os.environ and (nodes * processes > 1 or accelerate_config is not None)


def launch(
    arguments: list[str],
    nodes: int,
    processes: int,
    cpus: int,
    accelerate_config: str | None = None,
    place: Place | None = None,
) -> NoReturn:
    """Replace this process by the command that runs `dualspeed` with these `arguments` in all training processes.

    Args:
        nodes: nodes of this job.
        processes: training processes on each node.
        cpus: CPU cores on each node.
        accelerate_config: file that `accelerate config` writes, for DeepSpeed or FSDP; None: DDP.
        place: place of this node among several; None: Slurm knows.
    """
    if nodes > 1 and place is None and ON_NODE not in os.environ:
        os.environ[ON_NODE] = "1"
        _become(["srun", *srun_options(nodes, cpus), sys.executable, "-m", "dualspeed.cli", *arguments])
    os.environ["OMP_NUM_THREADS"] = str(max(1, cpus // processes))
    command = accelerate_command(nodes, processes, accelerate_config, place)
    _become([sys.executable, "-m", *command, "-m", "dualspeed.cli", *arguments])


def srun_options(nodes: int, cpus: int) -> list[str]:
    """Options of `srun`: one task on each node with all its cores; a failed task ends the others."""
    tasks = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    return [*tasks, "--kill-on-bad-exit=1", "--label"]


def accelerate_command(
    nodes: int, processes: int, accelerate_config: str | None, place: Place | None = None
) -> list[str]:
    """Command line of `accelerate launch` on this node, without the program that it starts."""
    command = ["accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", accelerate_config] if accelerate_config else ["--mixed_precision=no"]
    if not accelerate_config and nodes * processes > 1:
        command.append("--multi_gpu")  # on CPUs too: without it, accelerate would need MPI to spawn processes
    command += [f"--num_processes={nodes * processes}", f"--num_machines={nodes}", "--dynamo_backend=no"]
    if nodes > 1:
        place = place or Place(int(os.environ["SLURM_NODEID"]), _first_address(), _port_of_job())
        command += [f"--machine_rank={place.rank}", f"--main_process_ip={place.address}"]
    return [*command, f"--main_process_port={place.port if place else _free_port()}"]


@contextmanager
def one_of_several() -> Iterator[None]:
    """Run the body as one process of a job of several; if it ends well, leave the group and then end the process.

    The process ends right after Python's exit handlers. What Python does after them can abort it, and then the job
    fails: a thread of Gloo wants to free a tensor of the last collective, and waits for the interpreter's lock, which
    no thread gets any more (pytorch/pytorch#179291). Destroying the process group doesn't always end such a thread.
    A process that runs alone ends as ever.
    """
    has_ended_well = False

    def end() -> None:
        if has_ended_well:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    if "RANK" in os.environ:
        atexit.register(end)  # the last to run of those that are registered from now on
    yield
    distributed = sys.modules.get("torch.distributed")  # a command that has not imported it is in no group
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    has_ended_well = True


def _first_address() -> str:
    """Address of the job's first node, which may differ from the node's name."""
    first = _scontrol("hostnames", os.environ["SLURM_STEP_NODELIST"]).split()[0]
    return re.findall(r"NodeAddr=(\S+)", _scontrol("node", first))[0]


def _scontrol(*what: str) -> str:
    return run_program(["scontrol", "show", *what])


def _port_of_job() -> int:
    """Port of a Slurm job, the same on all of its nodes."""
    return PORTS[int(os.environ["SLURM_JOB_ID"]) % len(PORTS)]


def _free_port() -> int:
    """Port that no other job on this machine uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _become(command: list[str]) -> NoReturn:
    program = shutil.which(command[0]) or command[0]
    sys.stdout.flush()
    os.execv(program, [str(Path(program)), *command[1:]])
