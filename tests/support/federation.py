"""A complete federation on loopback with the documented commands: provision, serve, join, run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedsgcg.clients.guard.approval import approve, bundle_of_folder
from fedsgcg.deploy.certificates import make_site_key
from fedsgcg.deploy.coordinator.control import Control, control_of
from fedsgcg.deploy.coordinator.project import Kit
from tests.support import apart
from tests.support.link import Proxy
from tests.support.small import SMALL, stated_splits

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "160",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(REPOSITORY),
}


@dataclass
class Federation:
    """Kits below one folder, and the processes that serve them.

    Attributes:
        folder: Everything lies here.
        hospitals: Folder of the images.
        port: The public port.
        processes: Running commands by name.
        relays: Unix socket of each hospital that has a network of its own.
    """

    folder: Path
    hospitals: Path
    port: int = 0
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    relays: dict[str, Path] = field(default_factory=dict)

    @property
    def kit(self) -> Kit:
        """The coordinator's kit."""
        return Kit.at(self.folder / "kits")

    def provision(self, sites: Sequence[str], *plan: str, **changes: Any) -> None:
        """Write the project and make all kits, with data folders filled in and code approved."""
        self.port = self.port or free_ports(2)
        tree = {
            "name": "loopback",
            "server": f"127.0.0.1:{self.port}",
            "sites": list(sites),
            "plan": list({text.partition("=")[0]: text for text in (*SMALL, *plan)}.values()),
            "join_deadline_s": 150.0,
            "round_deadline_s": 400.0,
            **changes,
        }
        (self.folder / "project.yaml").write_text(yaml.safe_dump(tree))
        heldout = next((text[8:] for text in plan if text.startswith("heldout=")), "")
        if not self.data.exists():
            stated_splits(self.hospitals, self.data, heldout)
        command = ("provision", self.folder / "project.yaml", "-o", self.folder / "kits")
        self.command(*command)
        for site in sites:
            self.fill_in(site)
            make_site_key(self.site(site), site)
        keys = [("--register", f"{site}={self.site(site) / 'site.pub'}") for site in sites]
        self.command(*command, *(text for pair in keys for text in pair))

    @property
    def data(self) -> Path:
        """The hospitals' images, with the splits of a simulation."""
        return self.folder / "data"

    def fill_in(self, site: str, **changes: Any) -> None:
        """Fill in a hospital's `site.yaml` and approve the code that is installed."""
        path = self.site(site) / "site.yaml"
        own = {
            "data_root": str(self.data),
            "device": "cpu",
            "patient_floor": 1,
            "min_pixels": 1,
            **changes,
        }
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **own}))
        approve(bundle_of_folder(REPOSITORY), self.site(site) / "approved.json", "test")

    @contextlib.contextmanager
    def separate_networks(self, *sites: str) -> Iterator[dict[str, Proxy]]:
        """Give each hospital its own network with one link to the server, if the machine allows it.

        Otherwise the links lead through the machine's loopback.
        """
        alone = apart.possible()
        # A Unix socket's path has room for a hundred characters: no folder of a test's.
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            links = {}
            for site in sites:
                path = Path(name) / site
                links[site] = stack.enter_context(Proxy(self.port, listen=path if alone else 0))
                if alone:
                    self.relays[site] = path
                else:
                    self._reach(site, f"127.0.0.1:{links[site].port}")
            yield links

    def _reach(self, site: str, address: str) -> None:
        path = self.site(site) / "site.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "server": address}))

    def site(self, name: str) -> Path:
        """A hospital's kit."""
        return self.folder / "kits" / "sites" / name

    def serve(self, *more: str) -> None:
        """Start the server and wait until it answers the coordinator."""
        self.start("serve", "fedsgcg.deploy.cli.coordinator", "serve", self.kit.folder, *more)
        self.wait(self.answers, 60, "the server does not answer")

    def answers(self) -> bool:
        """Whether the server answers the coordinator and every site with a key may join."""
        with contextlib.suppress(Exception), control_of(self.kit) as control:
            return len(list(control.nodes())) >= len(list(self.kit.keys.glob("*.pub")))
        return False

    def join(self, *sites: str) -> None:
        """Start some hospitals."""
        for site in sites:
            self.start(site, "fedsgcg.deploy.cli.site", "join", self.site(site))

    def online(self, *sites: str) -> bool:
        """Whether the server sees hospitals."""
        with control_of(self.kit) as control:
            statuses = statuses_of(control)
        return all(statuses.get(site) == "online" for site in sites)

    def run(self, *overrides: str) -> None:
        """Start the study, without waiting for it."""
        self.start("run", "fedsgcg.deploy.cli.coordinator", "run", self.kit.folder, *overrides)

    def start(self, name: str, module: str, *arguments: str | Path) -> None:
        """Start a command in a session of its own, its output in `<name>.log`."""
        relay = self.relays.get(name)
        before = ["tests.support.apart", str(relay), str(self.port)] if relay else []
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    *before,
                    module,
                    *(str(argument) for argument in arguments),
                ],
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, **ENVIRONMENT, "FLWR_HOME": str(self.folder / "flwr" / name)},
                cwd=self.folder,
                start_new_session=True,
            )

    def command(self, *arguments: str | Path) -> str:
        """Run a command of `fedsgcg` to its end and return what it says."""
        done = self.try_command(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def try_command(
        self, *arguments: str | Path, module: str = "fedsgcg.deploy.cli.coordinator"
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever its exit code."""
        return subprocess.run(
            [sys.executable, "-P", "-m", module, *(str(argument) for argument in arguments)],
            capture_output=True,
            text=True,
            timeout=180,
            env={**os.environ, **ENVIRONMENT},
            cwd=self.folder,
        )

    def finish(self, name: str, seconds: float) -> int:
        """Wait for a command's end; returns its exit code."""
        try:
            return self.processes.pop(name).wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} has not ended in {seconds} s\n{self.logs()}") from None

    def wait(self, holds: Any, seconds: float, words: str) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"{words}\n{self.logs()}"
            time.sleep(0.3)

    def events(self) -> list[dict[str, Any]]:
        """Events of the only cell so far."""
        return [
            json.loads(line)
            for path in self.kit.runs.glob("*/*/*/*/events.jsonl")
            for line in path.read_text().splitlines()
        ]

    def seen(self, event: str, **facts: Any) -> bool:
        """Whether an event with some facts has happened."""
        return any(
            found["event"] == event
            and all(found.get(name) == value for name, value in facts.items())
            for found in self.events()
        )

    def outcome(self) -> dict[str, Any]:
        """How the only cell ended."""
        (path,) = self.kit.runs.glob("*/*/*/*/outcome.json")
        return dict(json.loads(path.read_text()))

    def log(self, name: str) -> str:
        """What a command has said."""
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """The ends of all logs, for a failed test."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("kits/coordinator/state/*.log")]
        paths += list(self.folder.glob("kits/sites/*/home/logs/*.log"))
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in paths)

    def kill(self, name: str) -> None:
        """Kill a command and everything it started, at once, by process id."""
        process = self.processes.pop(name)
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)

    def pause(self, name: str) -> None:
        """Stop a command and everything it started, as a machine that is suspended."""
        self.signal(name, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """Let a paused command go on."""
        self.signal(name, signal.SIGCONT)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a command and everything it started."""
        pid = self.processes[name].pid
        for each in [pid, *descendants(pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)

    def close(self) -> None:
        """End all processes: politely, then by force."""
        for process in self.processes.values():
            process.terminate()
        for name in list(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(20)
            self.kill(name)


def statuses_of(control: Control) -> dict[str, str]:
    """Status of each site as the server sees it."""
    return {node.site: node.status for node in control.nodes()}


def descendants(pid: int) -> list[int]:
    """Process ids of everything that a process has started, directly or not."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = path.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = list(parents.get(pid, []))
    for child in found:
        found.extend(parents.get(child, []))
    return found


def free_ports(count: int) -> int:
    """First of some ports in a row that are free now."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                for offset in range(1, count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except (OSError, OverflowError):
                continue
            return port
