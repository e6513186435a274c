"""Training over two hosts without Slurm: it trains as one, the loss of a host ends it with its name, and it resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualspeed.cli import make_parser
from dualspeed.cluster import heartbeat
from dualspeed.cluster.heartbeat import FAREWELL, Heartbeat
from dualspeed.cluster.launch import DEFAULT_PORT, Place, accelerate_command, place_of
from dualspeed.errors import ConfigError
from dualspeed.settings.jobs import write_settings
from tests.support.namespaces import Host, Hosts, why_not
from tests.support.slurm_cluster import wait_for
from tests.support.stage import assert_same_weights, stage_settings

PORT, NUM_STEPS = 29511, 200
TWO_MINUTES = 120


def options(*arguments: str):
    folders = [f"--{name}=x" for name in ("settings", "model", "data", "state", "out")]
    return make_parser().parse_args(["train", *folders, *arguments])


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    for name in ("SLURM_JOB_ID", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_node_knows_its_place_by_options_or_by_torchruns_variables(monkeypatch):
    given = options("--nodes", "2", "--node-rank", "1", "--main-address", "10.0.0.1", "--main-port", "1234")
    assert place_of(given) == Place(1, "10.0.0.1", 1234)
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "first")
    assert place_of(options("--nodes", "2")) == Place(0, "first", DEFAULT_PORT)
    assert place_of(given) == Place(1, "10.0.0.1", 1234)
    assert place_of(options()) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert place_of(options("--nodes", "2")) is None
    command = accelerate_command(2, 4, None, Place(1, "10.0.0.1", 1234))
    assert {"--machine_rank=1", "--main_process_ip=10.0.0.1", "--main_process_port=1234"} <= set(command)
    assert {"--num_processes=8", "--num_machines=2"} <= set(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"--node-rank \(or NODE_RANK\) is not given; valid in a job of 2 nodes without Slurm: 0 to 1"),
        (["--node-rank", "2", "--main-address", "a"], r"--node-rank \(or NODE_RANK\) is 2; valid"),
        (["--node-rank", "1"], r"--main-address \(or MASTER_ADDR\) is not given; valid: the address of node 0"),
        (
            ["--node-rank", "1", "--main-address", "a", "--main-port", "0"],
            r"--main-port \(or MASTER_PORT\) is 0; valid",
        ),
    ],
)
def test_a_place_that_is_missing_or_impossible_is_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        place_of(options("--nodes", "2", *arguments))


class Store(dict):
    """The part of torch's store that a heartbeat uses, in memory."""

    def add(self, key: str, amount: int) -> int:
        self[key] = self.get(key, 0) + amount
        return self[key]


def test_a_silent_node_is_lost_and_one_that_took_leave_is_not(monkeypatch):
    now = 0.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    store = Store()
    watcher = Heartbeat(store, node=0, num_nodes=3, main_address="10.0.0.1")
    watcher.names |= {1: "left", 2: "silent"}
    watcher.heard = {1: 0.0, 2: 0.0}
    watcher.beat()
    store["dualspeed/beat/1"] += FAREWELL
    now = heartbeat.SILENCE_SECONDS - 1
    watcher.beat()
    assert watcher.lost() is None
    now = heartbeat.SILENCE_SECONDS + 1
    watcher.beat()
    assert watcher.lost() == f"node 2 (silent) has given no sign of life for {now:.0f} s"
    store["dualspeed/beat/2"] += 1
    watcher.beat()
    assert watcher.lost() is None
    now += heartbeat.SILENCE_SECONDS + 1
    assert watcher.lost() == f"node 0 (10.0.0.1) has not answered for {heartbeat.SILENCE_SECONDS + 1:.0f} s"


@pytest.fixture(scope="module")
def can_make_hosts() -> None:
    if reason := why_not():
        pytest.skip(reason)


def start(stage_inputs: Path, folder: Path, hosts: tuple[Host, Host]) -> list[subprocess.Popen]:
    """Start the same command on both hosts, which share this machine's files."""
    settings = stage_settings()
    settings.recipe.training_arguments.update(max_steps=NUM_STEPS, save_steps=25)
    file = write_settings(settings, folder / "settings")
    paths = {"settings": file, "model": stage_inputs / "base", "data": stage_inputs / "data"}
    paths |= {"state": folder / "state", "out": folder / "out"}
    command = [sys.executable, "-m", "dualspeed.cli", "train", *(f"--{name}={path}" for name, path in paths.items())]
    command += ["--nodes=2", "--processes=1", f"--main-address={hosts[0].address}", f"--main-port={PORT}"]
    folder.mkdir(exist_ok=True)
    variables = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return [
        host.start([*command, f"--node-rank={rank}"], folder / f"{rank}.log", variables)
        for rank, host in enumerate(hosts)
    ]


def logs(folder: Path) -> list[str]:
    return [(folder / f"{rank}.log").read_text() for rank in (0, 1)]


def trained(stage_inputs: Path, folder: Path) -> Path:
    """Train in `folder` to the end; folder of the checkpoint."""
    with Hosts() as hosts:
        started = start(stage_inputs, folder, hosts)
        codes = [process.wait(600) for process in started]
    assert codes == [0, 0], logs(folder)
    return folder / "out"


@pytest.fixture(scope="module")
def undisturbed(can_make_hosts, stage_inputs, tmp_path_factory) -> Path:
    """Folder of a training over two hosts that nothing interrupted."""
    folder = tmp_path_factory.mktemp("hosts") / "undisturbed"
    trained(stage_inputs, folder)
    return folder


def kill(host: Host) -> None:
    """Kill all processes of a host at once."""
    for process in host.processes():
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_two_hosts_train_one_model(undisturbed):
    first, second = logs(undisturbed)
    assert "in 2 processes" in first and "in 2 processes" in second
    assert (undisturbed / "out/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("disaster", [kill, Host.unplug], ids=["killed", "unplugged"])
def test_the_loss_of_a_host_ends_the_job_with_its_name_and_it_resumes(undisturbed, stage_inputs, tmp_path, disaster):
    folder = tmp_path / "run"
    with Hosts() as hosts:
        first, second = start(stage_inputs, folder, hosts)
        wait_for(lambda: list(folder.glob("state/*/checkpoints/checkpoint-*/trainer_state.json")), 300, "checkpoint")
        begun = time.monotonic()
        disaster(hosts[1])
        assert first.wait(TWO_MINUTES) == 1
        assert second.wait(TWO_MINUTES) != 0
        print(f"the first host ended after {time.monotonic() - begun:.0f} s")
        log = logs(folder)[0]
        # Gloo names the address of a peer that has gone, the heartbeat the host that is silent.
        assert hosts[1].address in log or f"node 1 ({hosts[1].name})" in log, log[-3000:]
        if disaster is Host.unplug:
            assert f"dualspeed train: node 1 ({hosts[1].name}) has given no sign of life" in log
            assert f"dualspeed train: node 0 ({hosts[0].address}) has not answered" in logs(folder)[1]
    done = logs(folder)[0].count("'loss'")
    trained(stage_inputs, folder)
    assert logs(folder)[0].count("'loss'") - done < NUM_STEPS, "it trained from the start again"
    assert_same_weights(folder / "out", undisturbed / "out")
