"""A real Slurm on one machine for tests: munge, slurmctld and two nodes, from Debian's packages.

It has no systemd, no accounting database and no cgroups. Each node has one "GPU", a null device that Slurm counts and
assigns like a real one. Needs root, to make the devices and to write /etc/slurm/slurm.conf.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
SYSTEM_CONFIG = Path("/etc/slurm/slurm.conf")
NODES = ("node1", "node2")
KILL_WAIT_SECONDS = 30

SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired, by default two minutes.
AuthInfo=socket={lab}/munge.sock,cred_expire=5
SlurmctldPort=16817
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool-%n
SlurmctldPidFile={lab}/slurmctld.pid
SlurmdPidFile={lab}/%n.pid
SlurmctldLogFile={lab}/slurmctld.log
SlurmdLogFile={lab}/%n.log
PlugStackConfig={lab}/plugstack.conf
MailProg=/bin/true
MpiDefault=none
# Children that ignore SIGTERM are found by their process group; proctrack/linuxproc loses them.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
# Without an accounting database, squeue has to remember the jobs that have ended.
MinJobAge=86400
KillWait={kill_wait}
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=sched_interval=5,bf_interval=5
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP
"""


class Cluster:
    """Slurm daemons whose files are all in the folder `lab`."""

    def __init__(self, lab: Path) -> None:
        self.lab, self.config = lab, lab / "slurm.conf"
        self.processes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start all daemons and wait until both nodes take jobs."""
        self._configure()
        os.environ["SLURM_CONF"] = str(self.config)  # gres.conf is looked for beside it
        munge = ["munged", "--foreground", f"--key-file={self.lab}/munge.key", f"--socket={self.lab}/munge.sock"]
        munge += [f"--pid-file={self.lab}/munged.pid", f"--log-file={self.lab}/munged.log"]
        self._spawn([*munge, f"--seed-file={self.lab}/munged.seed", "--num-threads=2"])
        wait_for((self.lab / "munge.sock").exists, 20, "munge")
        self._spawn(["slurmctld", "-D"])
        for node in NODES:
            self._spawn(["slurmd", "-D", "-N", node])
        wait_for(lambda: slurm("sinfo", "-h", "-o", "%T").split() == ["idle"], 60, f"idle nodes (logs: {self.lab})")

    def stop(self) -> None:
        """End all jobs, then all daemons."""
        slurm("scancel", "--full", "--signal=KILL", "--user=root")
        slurm("scancel", "--user=root")
        deadline = time.monotonic() + 2 * KILL_WAIT_SECONDS
        while slurm("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        del os.environ["SLURM_CONF"]
        if SYSTEM_CONFIG.is_symlink() and SYSTEM_CONFIG.resolve() == self.config:
            SYSTEM_CONFIG.unlink()

    def _configure(self) -> None:
        for folder in ("state", *(f"spool-{node}" for node in NODES)):
            (self.lab / folder).mkdir(parents=True)
        self.lab.chmod(0o755)
        key = self.lab / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        devices = [self.lab / f"gpu{index}" for index in range(len(NODES))]
        for device in devices:  # a GPU without a device file counts as none
            subprocess.run(["mknod", device, "c", "1", "3"], check=True)
        pairs = list(zip(NODES, devices, strict=True))
        gres = [f"NodeName={node} Name=gpu File={device}" for node, device in pairs]
        (self.lab / "gres.conf").write_text("\n".join(gres) + "\n")
        nodes = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={16818 + index} CPUs=2 RealMemory=64000 "
            "Gres=gpu:1 State=UNKNOWN"
            for index, node in enumerate(NODES)
        ]
        self.config.write_text(SLURM_CONF.format(lab=self.lab, nodes="\n".join(nodes), kill_wait=KILL_WAIT_SECONDS))
        (self.lab / "plugstack.conf").write_text("")
        # The plugin's job step drops SLURM_CONF, so the file has to be where Slurm looks by itself.
        SYSTEM_CONFIG.parent.mkdir(exist_ok=True)
        SYSTEM_CONFIG.unlink(missing_ok=True)
        SYSTEM_CONFIG.symlink_to(self.config)

    def _spawn(self, command: list[str]) -> None:
        with (self.lab / "daemons.log").open("a") as log:
            path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PATH": path}))


def why_not() -> str | None:
    """Install Slurm if it is missing; returns the reason why none can be started here, or None."""
    if os.getuid() != 0:
        return "only root can start it (device nodes, /etc/slurm/slurm.conf)"
    if SYSTEM_CONFIG.exists() and not SYSTEM_CONFIG.is_symlink():
        return f"this machine has a Slurm of its own ({SYSTEM_CONFIG})"
    if socket.gethostbyname(socket.gethostname()) != "127.0.0.1":
        return f"{socket.gethostname()} has to mean 127.0.0.1 in /etc/hosts"
    if _missing() and (failure := _install()):
        return failure
    return f"the packages bring no {', '.join(_missing())}" if _missing() else None


def _missing() -> list[str]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def _install() -> str | None:
    """Install the packages; returns the reason if that failed."""
    if shutil.which("apt-get") is None:
        return f"{', '.join(PACKAGES)} are not installed, and there is no apt-get"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
    return f"apt-get install failed: {done.stderr.strip()[-300:]}" if done.returncode else None


def slurm(*command: str) -> str:
    """Output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> object:
    """Wait until `condition` returns a true value, and return it; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.2)
    return value
