"""The faults: each happens at a moment of a running study and ends on its own."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from tests.nemesis.link import Link
from tests.support.federation import Federation, descendants

REACTION_S: Final = 30.0
LATENCY_S, RATE, LOSS = 1.0, 100_000.0, 0.01
SKEW_S: Final = 600.0


class Scene(Protocol):
    """What a fault may use (`tests.nemesis.driver.Driver` is one)."""

    federation: Federation
    links: dict[str, Link]
    random: random.Random
    training: tuple[str, ...]

    def round(self) -> int:
        """Number of the round in progress over all studies, counted on."""

    def await_rounds(self, count: int, seconds: float) -> bool:
        """Wait until some more rounds have started; resumes a run that has ended."""

    def configure(self, site: str, **facts: object) -> None:
        """Write a hospital's `nemesis.json`."""

    def join(self, site: str) -> None:
        """Start a hospital."""

    def problems_since(self, start: int, site: str) -> str:
        """Codes that name a site in the events of later rounds, most recent study."""


Fault = Callable[[Scene, str], str]
"""Makes a fault at a site (which it may ignore) and returns what was seen."""


def kill_site(scene: Scene, site: str) -> str:
    """`kill -9` of a hospital's node and everything it has started, and a new start."""
    scene.federation.kill(site)
    scene.join(site)
    return ""


def kill_worker(scene: Scene, site: str) -> str:
    """`kill -9` of the process that trains."""
    pids = processes(scene.federation.processes[site].pid, "worker.py")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return f"{len(pids)} worker"


def pause_site(scene: Scene, site: str) -> str:
    """SIGSTOP of a hospital's processes for 3 to 15 seconds, as a suspended machine."""
    return paused(scene, site, scene.random.uniform(3, 15))


def pause_server(scene: Scene, site: str) -> str:
    """SIGSTOP of the coordinator's server for 3 to 10 seconds."""
    return paused(scene, "serve", scene.random.uniform(3, 10))


def paused(scene: Scene, name: str, seconds: float) -> str:
    scene.federation.pause(name)
    time.sleep(seconds)
    scene.federation.go_on(name)
    return f"{seconds:.0f} s"


def kill_server(scene: Scene, site: str) -> str:
    """`kill -9` of the coordinator's server with the run on it, and a new start."""
    scene.federation.kill("serve")
    scene.federation.serve()
    return ""


def kill_round_loop(scene: Scene, site: str) -> str:
    """`kill -9` of the process that holds the round loop; the server stays."""
    pids = processes(scene.federation.processes["serve"].pid, "flwr-serverapp")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return f"{len(pids)} process"


def partition(scene: Scene, site: str) -> str:
    """No connection between a hospital and the server for three rounds."""
    return with_link(scene, site, 3, cut=True)


def latency(scene: Scene, site: str) -> str:
    """2 seconds from question to answer for a round."""
    return with_link(scene, site, 1, delay_s=LATENCY_S)


def narrow(scene: Scene, site: str) -> str:
    """100 kB/s for a round."""
    return with_link(scene, site, 1, rate=RATE)


def loss(scene: Scene, site: str) -> str:
    """1 % of segments lost for two rounds."""
    return with_link(scene, site, 2, loss=LOSS)


def with_link(scene: Scene, site: str, rounds: int, *, cut: bool = False, **facts: float) -> str:
    link = scene.links[site]
    for name, value in facts.items():
        setattr(link, name, value)
    if cut:
        link.cut()
    try:
        scene.await_rounds(rounds, 60.0 * rounds)
    finally:
        link.restore()
    return ""


def wrong_clock(scene: Scene, site: str) -> str:
    """A hospital starts with a clock that is ten minutes ahead, then with the right one."""
    # Not killed: the server would refuse the key for a minute, whatever the clock.
    process = scene.federation.processes.pop(site)
    process.terminate()
    process.wait(60)
    scene.configure(site, skew_s=SKEW_S)
    before = len(scene.federation.log(site))
    scene.join(site)
    end = time.monotonic() + REACTION_S
    refused = False
    while not refused and time.monotonic() < end:
        refused = "[SITE-515]" in scene.federation.log(site)[before:]
        time.sleep(0.3)
    scene.federation.kill(site)
    scene.configure(site)
    scene.join(site)
    return "refused with SITE-515" if refused else "NOT refused"


def full_disk_of_site(scene: Scene, site: str) -> str:
    """No file of a hospital's processes can grow for one round."""
    with no_room(scene.federation.processes[site].pid):
        scene.await_rounds(1, 60)
    return ""


def full_disk_of_coordinator(scene: Scene, site: str) -> str:
    """No file of the round loop can grow until the run has stopped."""
    with no_room(*processes(scene.federation.processes["serve"].pid, "flwr-serverapp")):
        scene.await_rounds(1, 60)
    return ""


@contextlib.contextmanager
def no_room(*roots: int) -> Iterator[None]:
    """Refuse writes of some processes and their children beyond the first byte of a file."""
    try:
        limit_files(1, roots)
        yield
    finally:
        limit_files(resource.RLIM_INFINITY, roots)


def limit_files(size: int, roots: tuple[int, ...]) -> None:
    """Set the largest size of a file that processes and their children may write."""
    for root in roots:
        for pid in (root, *descendants(root)):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def processes(root: int, name: str) -> list[int]:
    """Processes below `root` whose command line contains a name."""
    found = []
    for pid in descendants(root):
        with contextlib.suppress(OSError):
            if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


FAULTS: Final[dict[str, Fault]] = {
    "kill -9 of a site": kill_site,
    "kill -9 of a worker": kill_worker,
    "site suspended": pause_site,
    "kill -9 of the server": kill_server,
    "kill -9 of the round loop": kill_round_loop,
    "server suspended": pause_server,
    "site cut off for 3 rounds": partition,
    "2 s latency": latency,
    "100 kB/s": narrow,
    "1 % loss": loss,
    "clock 10 minutes wrong": wrong_clock,
    "disk full at a site": full_disk_of_site,
    "disk full at the coordinator": full_disk_of_coordinator,
}
