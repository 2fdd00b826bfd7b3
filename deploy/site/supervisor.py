"""`fedsgcg-site join`: the hospital's node, kept alive: Flower's SuperNode and our resident, started and watched.

A SuperNode whose app died at a bad moment may wait for ever and still look online (stack.md 3.4), so the two belong
together: when either ends, both are started anew, with a pause that grows. A stop ends both, by their process ids.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from clients.guard.site_file import SiteFile
from common.errors import fail
from common.files.system import lock
from deploy.certificates import read_site_key
from deploy.site.check_link import examine_link
from deploy.site.commands import (
    environment,
    free_port,
    new_secret,
    resident_command,
    supernode_command,
)

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 20.0
MOST_FAILURES = 20
"""Restarts in a row, none of them healthy for `HEALTHY_S`, after which the site gives up and says so."""

HEALTHY_S = 300.0
LINK_GIVEN_UP = "the SuperNode gave up the link"
STUCK = {
    # It lost its link within a TLS handshake: its process stays, does nothing, and looks alive. A cut link does that,
    # and a proxy or load balancer that still accepts connections while the server behind it is away.
    "Giving up reconnection": LINK_GIVEN_UP,
    "SSL/TLS handshake error detected": LINK_GIVEN_UP,
    # It keeps half of the message; the error reply to that, minutes later, goes out in the place of the next run's
    # reply, which then waits for yet another message.
    "Ignoring message": "the run was stopped while its message came in",
}
"""What a SuperNode says that has to be started anew -> why."""

START_S = 60.0
STOP_S = 10.0
LAST_REPLY_S = 3.0
"""Time that the SuperNode gets to send the reply of a training that was ended."""

ELSEWHERE = "Set home in site.yaml to a folder on a local disk."
MOST_LOG_BYTES = 10 * 2**20
LIBC = ctypes.CDLL(None)
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
TROUBLE = {"Failed to activate SuperNode": "SITE-509"}
"""What Flower says -> our code."""

ADVICE = {
    "SITE-509": "another node may use this key now: a copy of this kit that has joined elsewhere (end it there: "
    "fedsgcg-site leave KIT; one kit is for one machine), or this node before a crash, which the coordinator notices "
    "within a minute; else ask it whether this site's key (site.pub) is registered, or revoked, and compare the "
    "clocks: fedsgcg-site check KIT"
}

Say = Callable[[str], None]


@dataclass
class Join:
    """A hospital's node from start to stop.

    Args:
        policy: The hospital's own settings.
        site_file: Where they are written.
        say: Shows one line to the person who started this.
        cold: Start a training process for every message instead of keeping one warm.
    """

    policy: SiteFile
    site_file: Path
    say: Say
    cold: bool = False
    stopping: threading.Event = field(default_factory=threading.Event)
    stuck: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> int:
        """Keep the node alive until told to stop (0), or until it does not stay alive (SITE-507).

        Raises:
            FedsgcgError: DEP-603 without a usable key; SITE-506 for a server whose certificate does not hold; SITE-508
                when another process has joined already; SITE-507; SITE-501 for an unusable folder.
        """
        home = prepare_home(self.policy)
        read_site_key(Path(self.policy.key))
        check_certificate(self.policy)
        with only_one(home):
            self.facts = {
                "pid": os.getpid(),
                "site": self.policy.site,
                "started": time.time(),
                "restarts": 0,
            }
            try:
                return self._keep_alive(home)
            finally:
                self._tell(state="left", supernode=0, resident=0)

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End both processes and return from `run`."""
        self.stopping.set()

    def _keep_alive(self, home: Path) -> int:
        failures, pause = 0, SHORTEST_PAUSE_S
        while not self.stopping.is_set():
            began = time.monotonic()
            why = self._live(home)
            if self.stopping.is_set():
                break
            if time.monotonic() - began > HEALTHY_S:
                failures, pause = 0, SHORTEST_PAUSE_S
            failures += (
                not self.stuck
            )  # the link may be away for days; that is no fault of this node
            if failures >= MOST_FAILURES:
                action = f"read {home / 'logs' / 'supernode.log'}, then fedsgcg-site check"
                raise fail(
                    "SITE-507",
                    where=self.policy.site,
                    found=f"{failures} restarts; last: {why}",
                    action=action,
                )
            self.facts["restarts"] += 1
            self._tell(state="restarting", last=why)
            self.say(f"{why}; starting again in {pause:.0f} s")
            self.stopping.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        return 0

    def _live(self, home: Path) -> str:
        """Run SuperNode and resident until one of them ends or the site is told to stop; return why it ended."""
        port = self.policy.runtime_port or free_port()
        secret = new_secret(home / "runtime.secret")
        children: list[subprocess.Popen[bytes]] = []
        self.stuck = ""
        try:
            node = self._start(
                supernode_command(self.policy, self.site_file, port, secret), home, "supernode"
            )
            children.append(node)
            self._tell(state="starting", supernode=node.pid, port=port)
            if not self._listens(node, port):
                return f"the SuperNode did not start (exit code {node.poll()})"
            resident = self._start(
                resident_command(self.site_file, port, secret, self.cold), home, "resident"
            )
            children.append(resident)
            self._tell(state="joined", resident=resident.pid)
            self.say(
                f"{self.policy.site} has started: SuperNode {node.pid}, resident {resident.pid}, {home / 'logs'}"
            )
            while not self.stopping.wait(0.5):
                if self.stuck:
                    return self.stuck
                if node.poll() is not None:
                    return f"the SuperNode ended with {node.returncode}"
                if resident.poll() is not None:
                    return f"the resident ended with {resident.returncode}"
            return "told to stop"
        finally:
            self._end(children)

    def _start(self, command: list[str], home: Path, name: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(  # noqa: S603 - the two commands below
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(self.policy),
            cwd=home,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call, nothing that could lock
        )
        log = home / "logs" / f"{name}.log"
        threading.Thread(
            target=self._follow, args=(child, log), name=f"log-{name}", daemon=True
        ).start()
        return child

    def _follow(self, child: subprocess.Popen[bytes], log: Path) -> None:
        """Copy a child's lines into its log and show the few that a person wants."""
        if child.stdout is None:
            raise AssertionError("children are started with a pipe")
        with bounded_log(log) as file:
            for line in child.stdout:
                file.write(line)
                file.flush()
                self._notice(line.decode(errors="replace").strip())

    def _notice(self, line: str) -> None:
        """Show and remember connection, messages and failures."""
        text = COLOURS.sub("", line)
        text = (
            text.partition(":")[2].strip()
            if text.startswith(("INFO", "WARNING", "ERROR"))
            else text
        )
        # Two threads come here, one a child: only what was found is written, or one would undo the other's finding.
        if why := next((why for words, why in STUCK.items() if words in text), ""):
            self.stuck = why
        if "SuperNode ID" in text:
            self._tell(node=text.rpartition(" ")[2], last="")
            self.say(f"connected to {self.policy.server}, node {text.rpartition(' ')[2]}")
        elif text.startswith(("Receiving:", "Sending:")):
            words = (
                text.partition(" (ID")[0]
                .replace("Receiving:", "received")
                .replace("Sending:", "sent")
            )
            self._tell(last_message=words, last_message_time=time.time())
            self.say(words)
        elif known := next((code for words, code in TROUBLE.items() if words in text), ""):
            problem = fail(known, where=self.policy.server, found=text, action=ADVICE[known])
            self._tell(last=str(problem).replace("\n  ", "; "))
            self.say(str(problem))
        elif "retrying in" in text:
            self._tell(last=text)
            self.say(text)

    def _listens(self, node: subprocess.Popen[bytes], port: int) -> bool:
        end = time.monotonic() + START_S
        while time.monotonic() < end and node.poll() is None and not self.stopping.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            time.sleep(0.2)
        return False

    def _end(self, children: list[subprocess.Popen[bytes]]) -> None:
        """End the resident first, so that the SuperNode can still send what it replied."""
        for child in reversed(children):
            busy = child.poll() is None
            end_process(child, STOP_S)
            if busy and child is not children[0]:
                time.sleep(LAST_REPLY_S)

    def _tell(self, **facts: Any) -> None:
        """Write what `status` shows."""
        self.facts |= facts
        path = Path(self.policy.home) / "join.json"
        partial = path.with_name(f"join.json.{threading.get_ident()}.partial")
        with suppress(OSError):  # a full disk must not end the node
            partial.write_text(json.dumps(self.facts), encoding="utf-8")
            partial.replace(path)


def check_certificate(policy: SiteFile) -> None:
    """Refuse a server that is not the one of the kit; one that does not answer yet is waited for by the SuperNode.

    Raises:
        FedsgcgError: SITE-506 for another authority, an expired certificate, a name that it is not for.
    """
    for finding in examine_link(policy, 0):
        if finding.verdict == "fail" and finding.name in ("certificate", "authority"):
            raise fail("SITE-506", where=policy.server, found=finding.found, action=finding.action)


def prepare_home(policy: SiteFile) -> Path:
    """Make the site's own folder, readable by its owner only.

    Raises:
        FedsgcgError: SITE-501 when it cannot be written.
    """
    home = Path(policy.home)
    try:
        for folder in (home, home / "logs", home / "flwr"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise fail(
            "SITE-501", where=str(home), found=str(error), expected="a folder that can be written"
        ) from error
    return home


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the site's lock; a second `join` of the same site gets SITE-508, a file system without locks CFG-008."""
    with (home / "join.lock").open("a") as file:
        if not lock(file, action=ELSEWHERE):
            action = "fedsgcg-site status KIT shows it, fedsgcg-site leave KIT ends it"
            raise fail("SITE-508", where=str(home), found="it has joined already", action=action)
        yield


@contextmanager
def bounded_log(path: Path) -> Iterator[Any]:
    """Open a log for appending; one that has grown large becomes `<name>.old` first."""
    if path.exists() and path.stat().st_size > MOST_LOG_BYTES:
        path.replace(path.with_name(path.name + ".old"))
    with path.open("ab") as file:
        yield file


def end_process(child: subprocess.Popen[bytes], patience_s: float) -> None:
    """Ask a child to end, then end its whole group."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def read_facts(path: Path) -> dict[str, Any]:
    """Return a small JSON file of the site's folder, {} when there is none that can be read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def joined_pid(home: Path) -> int:
    """Return the process id of the `join` that holds this site's lock, 0 when none does."""
    try:
        with (home / "join.lock").open("r+") as file:
            free = lock(file, action=ELSEWHERE)
    except FileNotFoundError:
        return 0
    return 0 if free else int(read_facts(home / "join.json").get("pid", 0))


def leave(policy: SiteFile, patience_s: float = 60.0) -> bool:
    """End this site's `join` and wait for it; returns whether there was one.

    Raises:
        FedsgcgError: SITE-508 when it does not end in time.
    """
    home = Path(policy.home)
    pid = joined_pid(home)
    if not pid:
        return False
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + patience_s
    while joined_pid(home):
        if time.monotonic() > end:
            raise fail(
                "SITE-508",
                found=f"process {pid} is still there after {patience_s:.0f} s",
                action=f"kill {pid}",
            )
        time.sleep(0.2)
    return True


def _end_with_parent() -> None:
    """In the child: ask the kernel for SIGTERM when the parent dies, so that nothing is left behind."""
    LIBC.prctl(DEATH_SIGNAL, signal.SIGTERM)
