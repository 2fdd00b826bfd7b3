"""`fedsgcg-site join`: start Flower's SuperNode and the resident, and restart them when they end.

A SuperNode whose app died before its first log line may wait forever and still look online
(docs/explanation/flower.md, "Behaviour that shaped the code"). When either process ends, both are
therefore restarted, with increasing pauses. Stopping ends both.
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

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.egress import LEDGER
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import Problem, fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.files.system import lock
from fedsgcg.deploy.certificates import read_site_key
from fedsgcg.deploy.environment import KEY_IN_USE, KEY_UNKNOWN
from fedsgcg.deploy.site.check_link import examine_link
from fedsgcg.deploy.site.commands import (
    ALIVE,
    environment,
    free_port,
    new_secret,
    resident_command,
    supernode_command,
)

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 20.0
MOST_FAILURES = 20
"""Consecutive restarts, each within `HEALTHY_S`, after which the site stops with an error."""

HEALTHY_S = 300.0
LINK_GIVEN_UP = "the SuperNode gave up the link"
STUCK = {
    # The link was lost during a TLS handshake: the process stays and does nothing, but looks alive.
    # Causes are an interrupted link, or a proxy or load balancer that still accepts connections
    # while the server behind it is down.
    "Giving up reconnection": LINK_GIVEN_UP,
    "SSL/TLS handshake error detected": LINK_GIVEN_UP,
    # The SuperNode keeps half of the message. Minutes later it sends the error reply to it in place
    # of the next run's reply, which then waits for another message.
    "Ignoring message": "the run was stopped while its message was being received",
}
"""Log text of a SuperNode that must be restarted -> reason."""

START_S = 60.0
STOP_S = 10.0
LAST_REPLY_S = 3.0
"""Time for the SuperNode to send the reply of a training that was ended."""

LOCAL_DISK = "Set home in site.yaml to a folder on a local disk."
MOST_LOG_BYTES = 10 * 2**20
LIBC = ctypes.CDLL(None)
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
REFUSED = "Failed to activate SuperNode"
"""Text of Flower when the server refuses the node; the server's reason is the next line."""

LEAVE_THE_COPY = (
    "a copy of this kit is in use on another machine: run fedsgcg-site leave KIT there; a kit is "
    "for one machine"
)
ASK = (
    "ask the coordinator whether this site's key (site.pub) is registered or revoked, and compare "
    "the clocks: fedsgcg-site check KIT"
)
REASONS = {
    KEY_IN_USE: (
        "SITE-521",
        "none if this node was just restarted or its link was cut: the coordinator releases a "
        "connection that is silent for half a minute, and this node tries again by itself. If "
        f"the message keeps coming, {LEAVE_THE_COPY}",
    ),
    KEY_UNKNOWN: ("SITE-509", ASK),
    "": ("SITE-509", f"{ASK}. If it is registered, perhaps {LEAVE_THE_COPY}"),
}
"""The server's reason -> code and advice; "" is a server that states none."""

Say = Callable[[str], None]


@dataclass
class Join:
    """A site's node from start to stop.

    Args:
        policy: The site's own settings.
        site_file: The file of these settings.
        say: Shows one line to the user.
        cold: Start a training process for every message instead of keeping one warm.
    """

    policy: SiteFile
    site_file: Path
    say: Say
    cold: bool = False
    stopping: threading.Event = field(default_factory=threading.Event)
    stuck: str = ""
    connected: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> int:
        """Keep the node alive until stopped; returns 0.

        Raises:
            FedsgcgError: DEP-603 without a usable key; SITE-520 or SITE-501 for a ledger that was
                changed; SITE-506 for a server certificate that
                cannot be verified; SITE-508 when another process has already joined; SITE-507 when
                the node does not stay alive; SITE-501 for an unusable folder.
        """
        home = prepare_home(self.policy)
        read_site_key(Path(self.policy.key))
        check_ledger(self.policy)
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
                self._write_state(state="left", supernode=0, resident=0)

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End both processes and return from `run`."""
        self.stopping.set()

    def _keep_alive(self, home: Path) -> int:
        failures, pause = 0, SHORTEST_PAUSE_S
        while not self.stopping.is_set():
            start = time.monotonic()
            why = self._live(home)
            if self.stopping.is_set():
                break
            if time.monotonic() - start > HEALTHY_S:
                failures, pause = 0, SHORTEST_PAUSE_S
            if not self.connected and not self.stuck and (clock := wrong_clock(self.policy)):
                self.say(clock)  # Flower ends such a node without giving a reason
            if not self.stuck:  # a link that is down for days is not a failure of this node
                failures += 1
            if failures >= MOST_FAILURES:
                action = f"read {home / 'logs' / 'supernode.log'}, then run fedsgcg-site check"
                raise fail(
                    "SITE-507",
                    where=self.policy.site,
                    found=f"{failures} restarts; last: {why}",
                    action=action,
                )
            self.facts["restarts"] += 1
            self._write_state(state="restarting", last=why)
            self.say(f"{why}; restarting in {pause:.0f} s")
            self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        return 0

    def _pause(self, seconds: float) -> None:
        """Wait for some time, after a lost link only until the server answers again."""
        end, was_away = time.monotonic() + seconds, False
        while (left := end - time.monotonic()) > 0:
            if self.stopping.wait(min(left, SHORTEST_PAUSE_S)):
                return
            if self.stuck == LINK_GIVEN_UP:
                answers = server_answers(self.policy)
                if answers and was_away:
                    return
                was_away = not answers

    def _live(self, home: Path) -> str:
        """Run SuperNode and resident until one ends or the site is stopped; return the reason."""
        children: list[subprocess.Popen[bytes]] = []
        self.stuck, self.connected = "", False
        try:
            port = self.policy.runtime_port or free_port()
            secret = new_secret(home / "runtime.secret")
            expect_pulse(home, 2 * START_S)
            node = self._start(
                supernode_command(self.policy, self.site_file, port, secret), home, "supernode"
            )
            children.append(node)
            self._write_state(state="starting", supernode=node.pid, port=port)
            if not self._listens(node, port):
                return f"the SuperNode did not start (exit code {node.poll()})"
            expect_pulse(home, START_S)  # until its own first pulse
            resident = self._start(
                resident_command(self.site_file, port, secret, self.cold), home, "resident"
            )
            children.append(resident)
            self._write_state(state="joined", resident=resident.pid)
            self.say(
                f"{self.policy.site} has started: SuperNode {node.pid}, resident {resident.pid}, "
                f"logs in {home / 'logs'}"
            )
            while not self.stopping.wait(0.5):
                if self.stuck:
                    return self.stuck
                if node.poll() is not None:
                    return f"the SuperNode ended with {node.returncode}"
                if resident.poll() is not None:
                    return f"the resident ended with {resident.returncode}"
                if silent_s(home) > 0:
                    return f"the resident does not respond ({silent_s(home):.0f} s too long)"
            return "stopped"
        except OSError as error:  # e.g. a full disk: tried again after a pause
            return f"the site could not start its processes: {error}"
        finally:
            self._end(children)

    def _start(self, command: list[str], home: Path, name: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(  # noqa: S603 - one of the two commands of deploy.site.commands
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
        """Copy a child's output into its log and show the important lines."""
        if child.stdout is None:
            raise AssertionError("_start opens a pipe")
        before = ""
        for line in child.stdout:
            # A full disk must not end this loop: the child would wait for ever to write a line.
            with suppress(OSError), bounded_log(log) as file:
                file.write(line)
            text = line.decode(errors="replace").strip()
            self._notice(text, before)
            before = text

    def _notice(self, line: str, before: str = "") -> None:
        """Show and record connection, messages and failures; `before` is the child's last line."""
        text = COLOURS.sub("", line)
        if text.startswith(("INFO", "WARNING", "ERROR")):
            text = text.partition(":")[2].strip()
        # Called from two threads, one per child: `stuck` is only set, never cleared, here.
        if why := next((why for pattern, why in STUCK.items() if pattern in text), ""):
            self.stuck = why
        if REFUSED in before:
            self._explain(text)
        if "SuperNode ID" in text:
            node = text.rpartition(" ")[2]
            self.connected = True
            self._write_state(node=node, last="")
            self.say(f"connected to {self.policy.server}, node {node}")
        elif text.startswith(("Receiving:", "Sending:")):
            event = text.partition(" (ID")[0]
            event = event.replace("Receiving:", "received").replace("Sending:", "sent")
            self._write_state(last_message=event, last_message_time=time.time())
            self.say(event)
        elif "retrying in" in text:
            self._write_state(last=text)
            self.say(text)

    def _explain(self, line: str) -> None:
        """Show why the server refused the node; `line` follows Flower's text."""
        known = next(name for name in REASONS if name in line)
        code, action = REASONS[known]
        found = line if known else f"{REFUSED}."
        problem = fail(code, where=self.policy.server, found=found, action=action)
        self._write_state(last=str(problem).replace("\n  ", "; "))
        self.say(str(problem))

    def _listens(self, node: subprocess.Popen[bytes], port: int) -> bool:
        end = time.monotonic() + START_S
        while time.monotonic() < end and node.poll() is None and not self.stopping.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            time.sleep(0.2)
        return False

    def _end(self, children: list[subprocess.Popen[bytes]]) -> None:
        """End the resident first, so that the SuperNode can still send its last reply."""
        for child in reversed(children):
            busy = child.poll() is None
            end_process(child, STOP_S)
            if busy and child is not children[0]:
                time.sleep(LAST_REPLY_S)

    def _write_state(self, **facts: Any) -> None:
        """Write the facts that `fedsgcg-site status` shows."""
        self.facts |= facts
        with suppress(OSError):  # a full disk must not end the node
            write_file(Path(self.policy.home) / "join.json", json.dumps(self.facts).encode())


def check_ledger(policy: SiteFile) -> None:
    """Verify the whole ledger, its signed head and the coordinator's receipts before joining.

    Raises:
        FedsgcgError: SITE-501 for a broken chain, SITE-520 for what contradicts the ledger.
    """
    path = Path(policy.home) / LEDGER
    problems = ledger.examine(path, Path(policy.key), Path(policy.ca)).problems
    if problems:
        raise fail("SITE-520", where=str(path), found="; ".join(problems), action=ledger.CONTINUE)


def check_certificate(policy: SiteFile) -> None:
    """Check that the server is the one of the kit.

    A server that does not answer is no error, because the SuperNode waits for it.

    Raises:
        FedsgcgError: SITE-506 for another authority, an expired certificate, or a name that is not
            in the certificate.
    """
    for finding in examine_link(policy, 0):
        if finding.verdict == "fail" and finding.name in ("certificate", "authority"):
            raise fail("SITE-506", where=policy.server, found=finding.found, action=finding.action)


def server_answers(policy: SiteFile) -> bool:
    """Return whether the kit's server accepts connections."""
    return any(
        finding.name == "certificate" and finding.verdict != "fail"
        for finding in examine_link(policy, 0)
    )


def wrong_clock(policy: SiteFile) -> str:
    """Return SITE-515 if the coordinator would reject this machine's time, else ""."""
    for finding in examine_link(policy, 0):
        if finding.area == "clock" and finding.verdict == "fail":
            problem = Problem(
                "SITE-515", found=finding.found, action=finding.action, where=policy.server
            )
            return str(problem)
    return ""


def prepare_home(policy: SiteFile) -> Path:
    """Make the site's home folder, readable by its owner only.

    Raises:
        FedsgcgError: SITE-501 when it cannot be written.
    """
    home = Path(policy.home)
    try:
        for folder in (home, home / "logs", home / "flwr"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise fail(
            "SITE-501", where=str(home), found=str(error), expected="a writable folder"
        ) from error
    return home


def expect_pulse(home: Path, silence_s: float) -> None:
    """Allow the resident to be silent for so long; makes the file of its pulse."""
    path, until = home / ALIVE, time.monotonic() + silence_s
    path.touch(mode=0o600)
    os.utime(path, (until, until))


def silent_s(home: Path) -> float:
    """Return for how long the resident has been silent beyond what it announced, or 0."""
    try:
        return max(0.0, time.monotonic() - (home / ALIVE).stat().st_mtime)
    except OSError:
        return 0.0  # the folder does not answer; the resident says so when it works


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the site's lock.

    Raises:
        FedsgcgError: SITE-508 when another `join` of the same site is running, CFG-008 for a file
            system without locks.
    """
    with (home / "join.lock").open("a") as file:
        if not lock(file, action=LOCAL_DISK):
            action = "fedsgcg-site status KIT shows it, fedsgcg-site leave KIT ends it"
            raise fail(
                "SITE-508", where=str(home), found="this site has already joined", action=action
            )
        yield


@contextmanager
def bounded_log(path: Path) -> Iterator[Any]:
    """Open a log for appending; a large log is renamed to `<name>.old` first."""
    if path.exists() and path.stat().st_size > MOST_LOG_BYTES:
        path.replace(path.with_name(path.name + ".old"))
    with path.open("ab") as file:
        yield file


def end_process(child: subprocess.Popen[bytes], patience_s: float) -> None:
    """Send a child SIGTERM, then kill its process group."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # it ends when its disk or device answers
        child.wait(patience_s)


def read_facts(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file in the site's folder, {} when it cannot be read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def joined_pid(home: Path) -> int:
    """Return the process id of the `join` that holds this site's lock, 0 when none does."""
    try:
        with (home / "join.lock").open("r+") as file:
            free = lock(file, action=LOCAL_DISK)
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
                found=f"process {pid} is still running after {patience_s:.0f} s",
                action=f"kill {pid}",
            )
        time.sleep(0.2)
    return True


def _end_with_parent() -> None:
    """In the child: request SIGTERM from the kernel when the parent dies."""
    LIBC.prctl(DEATH_SIGNAL, signal.SIGTERM)
