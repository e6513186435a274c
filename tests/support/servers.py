"""Servers that tests start, kill, pause and restart: an MLflow tracking server, and PostgreSQL as its database."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_SECONDS = 300


def free_port() -> int:
    """Free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MlflowServer:
    """`mlflow server` on a database, with the same address after every start."""

    def __init__(self, database: str, folder: Path) -> None:
        self.database, self.folder, self.port = database, folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> "MlflowServer":
        """Start the server and wait until it answers."""
        command = [
            "server",
            "--backend-store-uri",
            self.database,
            "--artifacts-destination",
            str(self.folder / "files"),
        ]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command],
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"mlflow server did not start:\n{(self.folder / 'server.log').read_text()[-3000:]}")
            time.sleep(0.2)
        return self

    def answers(self) -> bool:
        """True if the server reports that it is healthy."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """Send a signal to the server and its workers: SIGSTOP makes them hang, SIGCONT continues them."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(30)


@contextmanager
def mlflow_server(database: str, folder: Path) -> Iterator[MlflowServer]:
    """Run a tracking server until the block ends."""
    server = MlflowServer(database, folder)
    try:
        yield server.start()
    finally:
        server.kill()


class Postgres:
    """PostgreSQL cluster in a temporary folder; its only database is `postgres`."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs, self.port = folder, programs, free_port()
        self.uri = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs, as the user that owns the folder: the programs refuse root."""
        user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        command = [self.programs / program, "--pgdata", self.folder / "data", *arguments]
        log = self.folder / "setup.log"
        with log.open("a") as output:
            done = subprocess.run(command, cwd=self.folder, stdout=output, stderr=output, timeout=START_SECONDS, **user)
        if done.returncode:
            pytest.fail(f"{program} failed:\n{log.read_text()[-3000:]}")

    def create(self) -> None:
        """Create an empty cluster that trusts local users."""
        self.run("initdb", "--username", "postgres", "--auth", "trust", "--no-sync")

    def start(self) -> None:
        """Start PostgreSQL and wait until it accepts connections."""
        options = f"-c port={self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self.run("pg_ctl", "start", "--wait", "--log", str(self.folder / "postgres.log"), "--options", options)

    def stop(self) -> None:
        """Stop PostgreSQL without a clean shutdown, as a crash would."""
        self.run("pg_ctl", "stop", "--mode", "immediate")


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a PostgreSQL until the block ends; skips the test if none is installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'dualspeed[postgresql]'")
    installed = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    programs = next((Path(path).resolve().parent for path in installed if path), None)
    if programs is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # other users can't read pytest's own folders
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    server = Postgres(folder, programs)
    try:
        server.create()
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
