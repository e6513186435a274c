"""A sign of life of each node to all others, so that a job of several nodes ends when one of them falls silent.

A process that dies closes its connections, and the others fail at once. A node that loses its power or its network
closes nothing: the others would wait in their next exchange of gradients until its timeout, half an hour by default.
One process of each node counts up a number in the store of `accelerate launch`, on the first node, and looks at the
others'.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""Time without a sign of life after which a node counts as lost."""
STARTUP = timedelta(minutes=30)
"""Time within which all nodes have to have begun."""
CONNECT = timedelta(seconds=30)
FAREWELL = 2**40
"""Number that a node adds to its own when its training is over: it may be silent from then on."""


class Heartbeat:
    """Knowledge of a node about the others.

    Args:
        store: torch's key-value store on the first node.
        node: number of this node.
        num_nodes: nodes of the job.
        main_address: address of the first node, to be named when it doesn't answer.
    """

    def __init__(self, store: Any, node: int, num_nodes: int, main_address: str) -> None:
        self.store, self.node, self.main_address = store, node, main_address
        self.others = [other for other in range(num_nodes) if other != node]
        self.names = {0: main_address}
        self.beats: dict[int, int] = {}
        self.heard: dict[int, float] = {}
        """Node -> time at which its number changed last."""
        self.answered = time.monotonic()
        """Time of the last answer of the store."""
        self.is_over = threading.Event()

    def meet(self) -> None:
        """Tell the others this node's name, and wait for theirs."""
        self.store.set(f"dualspeed/name/{self.node}", socket.gethostname())
        for other in self.others:
            self.store.wait([f"dualspeed/name/{other}"], STARTUP)
            self.names[other] = self.store.get(f"dualspeed/name/{other}").decode()
        self.heard = dict.fromkeys(self.others, time.monotonic())
        self.answered = time.monotonic()

    def beat(self) -> None:
        """Count up this node's number, and read the others'."""
        self.store.add(f"dualspeed/beat/{self.node}", 1)
        for other in self.others:
            # Adding nothing reads a number, and makes it 0 where there is none yet.
            number = self.store.add(f"dualspeed/beat/{other}", 0)
            if number >= FAREWELL:
                self.heard.pop(other, None)
            elif number != self.beats.get(other):
                self.beats[other], self.heard[other] = number, time.monotonic()
        self.answered = time.monotonic()

    def leave(self) -> None:
        """Take leave of the others, and stop to watch them."""
        self.store.add(f"dualspeed/beat/{self.node}", FAREWELL)
        self.is_over.set()

    def lost(self) -> str | None:
        """Sentence on a node that has been silent for too long; None if there is none."""
        now = time.monotonic()
        if now - self.answered > SILENCE_SECONDS:
            return f"node 0 ({self.main_address}) has not answered for {now - self.answered:.0f} s"
        for other, last in self.heard.items():
            if now - last > SILENCE_SECONDS:
                return f"node {other} ({self.names[other]}) has given no sign of life for {now - last:.0f} s"
        return None


@contextmanager
def watch_nodes() -> Iterator[None]:
    """End this process, with one sentence, once a node of its job is silent; does nothing in a job of one node.

    Open in each training process; the first one of each node watches, and its end ends the others there.
    """
    if os.environ.get("LOCAL_RANK") != "0" or int(os.environ.get("GROUP_WORLD_SIZE", "1")) < 2:
        yield
        return
    from torch.distributed import TCPStore  # takes seconds, which other commands need not wait for

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=CONNECT)
    node, num_nodes = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    heartbeat = Heartbeat(store, node, num_nodes, address)
    threading.Thread(target=keep_watch, args=(heartbeat,), daemon=True).start()
    yield
    heartbeat.leave()


def keep_watch(heartbeat: Heartbeat) -> None:
    """Meet the other nodes, then end the process if one is lost; beats have a thread of their own: they may hang."""
    heartbeat.meet()
    threading.Thread(target=keep_beating, args=(heartbeat,), daemon=True).start()
    while not heartbeat.is_over.wait(BEAT_SECONDS):
        if sentence := heartbeat.lost():
            print(f"dualspeed train: {sentence}; start the job again to go on", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may wait in an exchange that never ends


def keep_beating(heartbeat: Heartbeat) -> None:
    """Beat until the training is over; a store that fails has stopped to answer, which `lost` notices."""
    while not heartbeat.is_over.is_set():
        try:
            heartbeat.beat()
        except RuntimeError:
            return
        heartbeat.is_over.wait(BEAT_SECONDS)
