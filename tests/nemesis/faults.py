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
from typing import Any, Final, NamedTuple, Protocol

from tests.nemesis.link import Link
from tests.nemesis.resident import POISONS
from tests.nemesis.schedule import PARTITION, PAUSED
from tests.support.federation import Federation, descendants

REACTION_S: Final = 30.0
LATENCY_S, RATE, LOSS = 1.0, 100_000.0, 0.01
SKEW_S: Final = 600.0


class Seen(NamedTuple):
    """Whether a fault has had its effect, and what was seen of it."""

    effect: bool
    text: str = ""


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

    def record(self, event: str, **facts: Any) -> None:
        """Append a line to the history."""

    def events(self) -> list[dict[str, Any]]:
        """Events of the current study."""


Fault = Callable[[Scene, str], Seen]
"""Makes a fault at a site (which it may ignore) and returns what was seen."""


def kill_site(scene: Scene, site: str) -> Seen:
    """`kill -9` of a hospital's node and everything it has started, and a new start."""
    scene.federation.kill(site)
    scene.join(site)
    return Seen(True)


def kill_worker(scene: Scene, site: str) -> Seen:
    """`kill -9` of the process that trains."""
    return killed(scene.federation.processes[site].pid, "worker.py")


def killed(root: int, name: str) -> Seen:
    """`kill -9` of the processes below `root` that have a name, once there is one."""
    end = time.monotonic() + REACTION_S
    while not (pids := processes(root, name)) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return Seen(bool(pids))


def pause_site(scene: Scene, site: str) -> Seen:
    """SIGSTOP of a hospital's processes for 3 to 15 seconds, as a suspended machine."""
    return paused(scene, site, scene.random.uniform(3, 15))


def pause_server(scene: Scene, site: str) -> Seen:
    """SIGSTOP of the coordinator's server for 3 to 10 seconds."""
    return paused(scene, "serve", scene.random.uniform(3, 10))


def paused(scene: Scene, name: str, seconds: float) -> Seen:
    scene.federation.pause(name)
    time.sleep(seconds)
    state = Path(f"/proc/{scene.federation.processes[name].pid}/stat").read_text()
    scene.federation.go_on(name)
    return Seen(state.rpartition(")")[2].split()[0] == "T", f"{seconds:.0f} s")


def kill_server(scene: Scene, site: str) -> Seen:
    """`kill -9` of the coordinator's server with the run on it, and a new start."""
    scene.federation.kill("serve")
    scene.federation.serve()
    return Seen(True)


def kill_round_loop(scene: Scene, site: str) -> Seen:
    """`kill -9` of the process that holds the round loop; the server stays."""
    return killed(scene.federation.processes["serve"].pid, "flwr-serverapp")


def partition(scene: Scene, site: str) -> Seen:
    """No connection between a hospital and the server for three rounds."""
    scene.record("cut", site=site)
    try:
        # The round in progress may have the site's reply already.
        return with_link(scene, site, 4, cut=True)
    finally:
        scene.record("cut.over", site=site)


def rejected_until_paused(scene: Scene, site: str) -> Seen:
    """Bad replies of one hospital until it is paused, then honest ones until it is back."""
    poison = scene.random.choice(sorted(POISONS))
    scene.configure(site, poison=poison)
    before = until = scene.events()[-1]["time"]
    for _ in range(6):
        scene.await_rounds(1, 90)
        found = [e for e in scene.events() if e["event"] == "site.paused" and e["time"] > before]
        if found:
            until = found[-1]["until"]
            break
    scene.configure(site)
    for _ in range(6):
        if found and scene.events()[-1]["round"] > until + 1:
            break
        scene.await_rounds(1, 90)
    return Seen(bool(found), f"{poison}; paused until round {until}" if found else "NOT paused")


def latency(scene: Scene, site: str) -> Seen:
    """2 seconds from question to answer for a round."""
    return with_link(scene, site, 1, delay_s=LATENCY_S)


def narrow(scene: Scene, site: str) -> Seen:
    """100 kB/s for a round."""
    return with_link(scene, site, 1, rate=RATE)


def loss(scene: Scene, site: str) -> Seen:
    """1 % of segments lost for two rounds."""
    return with_link(scene, site, 2, loss=LOSS)


def with_link(scene: Scene, site: str, rounds: int, *, cut: bool = False, **facts: float) -> Seen:
    link = scene.links[site]
    lost, passed = link.lost, link.up.passed + link.down.passed
    for name, value in facts.items():
        setattr(link, name, value)
    if cut:
        link.cut()
    try:
        scene.await_rounds(rounds, 60.0 * rounds)
    finally:
        link.restore()
    lost, passed = link.lost - lost, link.up.passed + link.down.passed - passed
    if cut:
        return Seen(True)
    if "loss" in facts:
        return Seen(lost > 0, f"{lost} segments lost")
    return Seen(passed > 0, f"{passed // 1000} kB passed")


def wrong_clock(scene: Scene, site: str) -> Seen:
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
    return Seen(refused, "refused with SITE-515" if refused else "NOT refused")


def full_disk_of_site(scene: Scene, site: str) -> Seen:
    """No file of a hospital's processes can grow until a reply was refused."""
    with no_room(scene.federation.processes[site].pid):
        for _ in range(3):
            before = len(scene.events())
            scene.await_rounds(1, 60)
            refused = [e for e in scene.events()[before:] if e.get("code") == "SITE-501"]
            if refused:
                break
    return Seen(bool(refused), "refused with SITE-501" if refused else "NOT refused")


def full_disk_of_coordinator(scene: Scene, site: str) -> Seen:
    """No file of the round loop can grow until the run has stopped."""
    starts = sum(event["event"] == "run.started" for event in scene.events())
    with no_room(*processes(scene.federation.processes["serve"].pid, "flwr-serverapp")):
        scene.await_rounds(1, 120)
    stopped = sum(event["event"] == "run.started" for event in scene.events()) > starts
    return Seen(stopped, "stopped" if stopped else "NOT stopped")


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
    PARTITION: partition,
    PAUSED: rejected_until_paused,
    "2 s latency": latency,
    "100 kB/s": narrow,
    "1 % loss": loss,
    "clock 10 minutes wrong": wrong_clock,
    "disk full at a site": full_disk_of_site,
    "disk full at the coordinator": full_disk_of_coordinator,
}
