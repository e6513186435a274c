"""Ends the Slurm jobs that a killed snakemake left behind: they would hold the folders that its restart writes to."""

import os
import re
import subprocess
import time
from pathlib import Path

from dualspeed.errors import SnakemakeIsLiveError

# What the Slurm plugin logs, and names all jobs of a run by.
RUN_ID = re.compile(r"SLURM run ID: (\S+)")
WAIT_SECONDS = 180


def end_jobs(project: Path) -> list[str]:
    """Cancel this project's Slurm jobs and wait until they are gone; returns their ids.

    Raises:
        SnakemakeIsLiveError: a snakemake runs in this folder, on this machine.
    """
    if live := live_snakemakes(project):
        raise SnakemakeIsLiveError(f"snakemake runs in {project} (process {live[0]}); its jobs are no leftovers")
    names = run_ids(project / ".snakemake" / "log")
    if jobs := jobs_of(names):
        print(f"ending {len(jobs)} Slurm jobs that were left over: {' '.join(jobs)}")
        subprocess.run(["scancel", *jobs], check=True)
    deadline = time.monotonic() + WAIT_SECONDS
    while remaining := jobs_of(names):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Slurm jobs {' '.join(remaining)} do not end")
        time.sleep(1)
    return jobs


def run_ids(logs: Path) -> set[str]:
    """Names of the Slurm jobs of all runs that Snakemake logged in a folder."""
    return {name for log in logs.glob("*.log") for name in RUN_ID.findall(log.read_text(errors="replace"))}


def jobs_of(names: set[str]) -> list[str]:
    """Ids of the user's jobs of these names that are in the queue."""
    if not names:
        return []
    queue = ["squeue", "--me", "--noheader", "--format=%A %j", "--states=PD,R,CG,CF,S,ST,SO,RQ,RS,SI"]
    lines = subprocess.run(queue, check=True, capture_output=True, text=True).stdout.splitlines()
    return [job for job, _, name in (line.partition(" ") for line in lines) if name.strip() in names]


def live_snakemakes(project: Path) -> list[int]:
    """Processes of this machine that run the workflow in a folder; those of jobs are none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            is_here = Path(os.readlink(process / "cwd")) == project.resolve()
        except OSError:  # another user's, or gone
            continue
        runs = any(Path(word).name == "snakemake" for word in words[:3])
        if is_here and runs and "--mode" not in words and "remote" not in words:
            found.append(int(process.name))
    return sorted(found)
