"""`fedsgcg serve`: the coordinator's server, from a kit; it lets registered hospitals in and revoked ones out."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from common.console import Screen
from common.errors import FedsgcgError, fail
from deploy.certificates import (
    RENEW_WITHIN_DAYS,
    days_left,
    is_signed_by,
    names_of,
    public_key_bytes,
    read_certificate,
    read_public_key,
)
from deploy.coordinator.control import GONE, Control, Node, control_of
from deploy.coordinator.last_run import last_started
from deploy.coordinator.project import Kit, Project, is_loopback
from deploy.coordinator.state_cleanup import LOG_BYTES, tidy
from deploy.environment import prepare_environment

LOOK_S: Final = 2.0
ROUTINE: Final = ("ControlServicer.ListNodes", "ControlServicer.ListRuns")
"""What our own looking around would fill the log with."""

LOGGERS: Final = ("flwr", "uvicorn", "uvicorn.error")


def serve_kit(path: Path, console: Screen, *, insecure: bool = False, listen: str = "") -> int:
    """Serve a kit until the process is told to stop.

    Args:
        path: The coordinator's kit.
        console: Where hospitals coming and going are told.
        insecure: Without TLS and keys; refused unless everything stays on this machine.
        listen: Address to bind instead of the project's, e.g. inside a container.

    Returns:
        The exit code.

    Raises:
        FedsgcgError: DEP-604 without a kit, DEP-607 for a certificate that hospitals would refuse, DEP-608 for
            `insecure` outside loopback, DEP-609 for a port that is taken.
    """
    from deploy.coordinator.superlink import (
        Doors,
        serve,
    )  # Flower's server takes a second to import

    kit = Kit.at(path)
    project = kit.project()
    host = listen or project.host_to_bind
    if insecure:
        check_insecure(project, host)
    else:
        check_certificate(kit, project, console)
    control_port = int(project.control_address.rpartition(":")[2])
    check_port(host, project.address[1])
    check_port("127.0.0.1", control_port)
    prepare_state(kit, insecure=insecure)
    with console.status("clearing away what ended runs have left"):
        told = tidy(kit)
    if told:
        console.print(told)
    doors = Doors(
        host=host,
        port=project.address[1],
        control_port=control_port,
        ca=None if insecure else kit.folder / "ca.crt",
        certificate=kit.folder / "server.crt",
        key=kit.folder / "server.key",
        token=kit.token.read_text().strip(),
        executor_secret=kit.folder / "executor.secret",
        database=kit.state / "superlink.db",
        log=kit.state / "runs.log",
    )
    watch = Watch(kit, console)

    def ready() -> None:
        kind = "WITHOUT TLS, on this machine only" if insecure else "TLS, registered hospitals only"
        console.print(f"{project.name}: serving {host}:{doors.port} ({kind})")
        console.print(f"logs: {kit.state / 'server.log'}, {kit.state / 'runs.log'}")
        watch.start()

    asyncio.run(serve(doors, ready, watch.stop))
    console.print("server ended")
    return 0


def check_insecure(project: Project, host: str) -> None:
    """Refuse a server without TLS that anybody else could reach."""
    if is_loopback(host) and is_loopback(project.address[0]):
        return
    raise fail(
        "DEP-608",
        where=f"{host}, for hospitals {project.server}",
        found="--insecure",
        expected="127.0.0.1, ::1 or localhost in both places",
        action="leave --insecure out: provision has made the certificates",
    )


def check_certificate(kit: Kit, project: Project, console: Screen) -> None:
    """Refuse a certificate that hospitals would refuse, while the person who can renew it is looking."""
    certificate = read_certificate(kit.folder / "server.crt")
    authority = read_certificate(kit.folder / "ca.crt")
    left, names = days_left(certificate), names_of(certificate)
    action = f"fedsgcg provision {kit.folder / 'project.yaml'} -o {kit.folder.parent} --renew"
    where = str(kit.folder / "server.crt")
    if left <= 0 or days_left(authority) <= 0:
        found = f"it ended on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        raise fail(
            "DEP-607",
            where=where,
            found=found,
            expected="a certificate that is still good",
            action=action,
        )
    if project.address[0] not in names:
        found = f"it is for {', '.join(names)}"
        raise fail("DEP-607", where=where, found=found, expected=project.address[0], action=action)
    if not is_signed_by(certificate, authority):
        raise fail(
            "DEP-607",
            where=where,
            found="another authority signed it",
            expected="ca.crt",
            action=action,
        )
    if left < RENEW_WITHIN_DAYS:
        console.print(f"The server's certificate ends in {left:.0f} days: {action}", style="yellow")


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken, or an address that this machine does not have (DEP-609)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            action = (
                "is another `fedsgcg serve` running? end it, or change the port in project.yaml"
            )
            raise fail(
                "DEP-609", where=f"{host}:{port}", found=error.strerror or str(error), action=action
            ) from error


def prepare_state(kit: Kit, *, insecure: bool) -> None:
    """Make the server's own folder, send logs there, and keep Flower from the internet and from installing things."""
    for folder in (kit.state, kit.runs):
        folder.mkdir(exist_ok=True, mode=0o700)
    marker = kit.state / "insecure"
    marker.touch() if insecure else marker.unlink(missing_ok=True)
    prepare_environment()
    os.environ["FLWR_HOME"] = str(kit.state / "flwr")
    os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    os.chdir(
        kit.state
    )  # a run's process starts here: no package of this folder can hide the bundle's
    handler = logging.handlers.RotatingFileHandler(
        kit.state / "server.log", maxBytes=LOG_BYTES, backupCount=5
    )
    handler.addFilter(lambda record: not record.getMessage().startswith(ROUTINE))
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def synchronise(kit: Kit, control: Control) -> list[str]:
    """Make the server's list of hospitals that of the kit's `keys/`; returns what was changed, in words."""
    wanted = {path.stem: read_public_key(path) for path in sorted(kit.keys.glob("*.pub"))}
    keys = {public_key_bytes(line): site for site, line in wanted.items()}
    there = [node for node in control.nodes() if node.status != GONE]
    told = []
    for node in there:
        if keys.get(node.key) != node.site:
            control.unregister(node.node)
            told.append(f"{node.site}: not let in any more")
    registered = {node.key for node in there if keys.get(node.key) == node.site}
    for key, site in keys.items():
        if key not in registered:
            control.register(site, wanted[site])
            told.append(f"{site}: may join")
    return told


def end_orphan(kit: Kit, control: Control) -> int:
    """Stop the run that a server which was killed has left behind: its process died with that server.

    Returns:
        Its number, 0 when there is none. Without this Flower would take a minute to notice, and refuse the next run
        meanwhile (stack.md 3.4).
    """
    try:
        started = last_started(kit)
        state = control.run(started.run_id)
        if state is None or state.over:
            return 0
        control.stop(started.run_id)
    except FedsgcgError:
        return 0  # nothing was started with this kit, or the server will say so at the next look
    return started.run_id


@dataclass
class Watch:
    """Keeps the server's hospitals those of the kit, and says who comes and goes.

    Args:
        kit: The kit.
        console: Where it is told.
    """

    kit: Kit
    console: Screen
    _seen: dict[str, str] = field(default_factory=dict)
    _stamp: float = -1.0
    _trouble: str = ""
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start watching, on a thread of its own."""
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching; returns at once, since the server's own loop may be calling."""
        self._ended.set()

    def _watch(self) -> None:
        with control_of(self.kit) as control:
            if run_id := end_orphan(self.kit, control):
                self._tell(
                    f"run {run_id} was cut off when the server ended; fedsgcg resume {self.kit.folder} goes on"
                )
            while True:
                self._look_and_tell(control)
                if self._ended.wait(LOOK_S):
                    return

    def _look_and_tell(self, control: Control) -> None:
        """Look once; a key file that cannot be read is told once and does not stop the server."""
        try:
            self.look(control)
            self._trouble = ""
        except FedsgcgError as error:
            if self._trouble != (trouble := str(error)) and not self._ended.is_set():
                self._tell(trouble)
            self._trouble = trouble

    def look(self, control: Control) -> None:
        """Take in changed keys, and tell whose status changed."""
        stamp = self.kit.keys.stat().st_mtime
        if stamp != self._stamp:
            for words in synchronise(self.kit, control):
                self._tell(words)
            self._stamp = stamp
        statuses = {node.site: node.status for node in control.nodes() if node.status != GONE}
        for site in sorted(statuses):
            if self._seen.get(site, "registered") != statuses[site]:
                self._tell(f"{site} is {statuses[site]}")
        self._seen = statuses

    def _tell(self, words: str) -> None:
        clock = time.strftime("%H:%M:%S")
        self.console.print(f"{clock}  {words}")


def presence(nodes: list[Node], sites: tuple[str, ...]) -> Mapping[str, str]:
    """Site -> `online`, `offline`, `never came` or `not registered`."""
    known = {node.site: node.status for node in nodes if node.status != GONE}
    words = {"registered": "never came", "": "not registered"}
    return {site: words.get(known.get(site, ""), known.get(site, "")) for site in sites}
