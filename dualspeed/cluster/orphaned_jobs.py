"""Orphaned Slurm jobs, whose snakemake was killed: they must end before a new snakemake writes to the same folders."""

import os
import re
import time
from pathlib import Path

from dualspeed.errors import OrphanedJobsError, SnakemakeIsLiveError
from dualspeed.programs import run_program

# Logged by Snakemake's Slurm plugin; the name of all Slurm jobs of a run.
RUN_ID = re.compile(r"SLURM run ID: (\S+)")
WAIT_SECONDS = 180


def end_jobs(project: Path) -> list[str]:
    """Cancel the Slurm jobs of a project's folder and wait until they are gone; returns their ids.

    Raises:
        SnakemakeIsLiveError: a snakemake on this machine still runs in the folder.
        ProgramError: there is no Slurm, or it doesn't answer.
        OrphanedJobsError: the jobs don't end within WAIT_SECONDS.
    """
    if live := live_snakemakes(project):
        raise SnakemakeIsLiveError(
            f"snakemake still runs in {project} (process {live[0]}), so its jobs are not orphaned"
        )
    names = run_ids(project / ".snakemake" / "log")
    if jobs := jobs_of(names):
        print(f"ending {len(jobs)} Slurm jobs that were left over: {' '.join(jobs)}")
        run_program(["scancel", *jobs])
    deadline = time.monotonic() + WAIT_SECONDS
    while remaining := jobs_of(names):
        if time.monotonic() > deadline:
            raise OrphanedJobsError(
                f"Slurm jobs {' '.join(remaining)} have not ended {WAIT_SECONDS} s after they were cancelled"
            )
        time.sleep(1)
    return jobs


def run_ids(logs: Path) -> set[str]:
    """Names of the Slurm jobs of all runs, from the folder of Snakemake's logs."""
    return {name for log in logs.glob("*.log") for name in RUN_ID.findall(log.read_text(errors="replace"))}


def jobs_of(names: set[str]) -> list[str]:
    """Ids of the user's jobs in Slurm's queue that have one of these names."""
    if not names:
        return []
    queue = ["squeue", "--me", "--noheader", "--format=%A %j", "--states=PD,R,CG,CF,S,ST,SO,RQ,RS,SI"]
    lines = run_program(queue).splitlines()
    return [job for job, _, name in (line.partition(" ") for line in lines) if name.strip() in names]


def live_snakemakes(project: Path) -> list[int]:
    """Process ids of the snakemakes on this machine that run the workflow in a folder, without those of jobs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            is_here = Path(os.readlink(process / "cwd")) == project.resolve()
        except OSError:  # the process is another user's, or has ended
            continue
        runs = any(Path(word).name == "snakemake" for word in words[:3])
        if is_here and runs and "--mode" not in words and "remote" not in words:
            found.append(int(process.name))
    return sorted(found)
