"""Two hosts on this machine: network namespaces, each with an address of its own, joined by a virtual cable.

Processes in one reach those in the other over its address alone; taking the cable down silences them without closing
anything, as a host does that has lost its power. Needs root and iproute2.
"""

import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

INTERFACE = "cable"


class Host:
    """A host by its number, 0 or 1."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.address = f"{name}-{number}", f"10.99.0.{number + 1}"

    def command(self, *command: str) -> list[str]:
        """Command line that runs a command on this host, under its own host name."""
        program = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", program, "sh", *command]

    def start(self, command: list[str], log: Path, variables: Mapping[str, str]) -> subprocess.Popen:
        """Start a command on this host, in a process group of its own, with its output in a file."""
        with log.open("a") as output:
            environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE} | variables
            started = self.command(*command)
            return subprocess.Popen(started, stdout=output, stderr=output, env=environment, start_new_session=True)

    def unplug(self) -> None:
        """Take this host's end of the cable down."""
        ip("-n", self.name, "link", "set", INTERFACE, "down")

    def processes(self) -> list[int]:
        """Ids of the processes on this host."""
        return [int(line) for line in ip("netns", "pids", self.name).split()]


class Hosts:
    """Both hosts, while the context is open; what still runs on them then is killed."""

    def __init__(self) -> None:
        self.name = f"ds{uuid.uuid4().hex[:6]}"
        self.hosts = (Host(self.name, 0), Host(self.name, 1))

    def __enter__(self) -> tuple[Host, Host]:
        first, second = self.hosts
        for host in self.hosts:
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            INTERFACE,
            "netns",
            first.name,
            "type",
            "veth",
            "peer",
            "name",
            INTERFACE,
            "netns",
            second.name,
        )
        for host in self.hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", host.name, "link", "set", INTERFACE, "up")
        return self.hosts

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            for process in host.processes():
                subprocess.run(["kill", "-9", str(process)], check=False)
            ip("netns", "delete", host.name)


def ip(*arguments: str) -> str:
    """Output of an `ip` command; RuntimeError with its message if it fails."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, env=os.environ | {"PATH": path})
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str | None:
    """Reason why no hosts can be made here; None if they can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [program for program in ("ip", "unshare") if shutil.which(program, path=path) is None]:
        return f"{', '.join(missing)} is not installed"
    try:
        with Hosts() as (first, _):
            subprocess.run(first.command("true"), check=True, capture_output=True)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return f"no network namespaces: {error}"
    return None
