"""`fedsgcg serve`: run the coordinator's server from a kit and keep its registrations current."""

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

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.signing import KIT
from fedsgcg.common.settings.run import TelemetrySettings
from fedsgcg.deploy.certificates import (
    RENEW_WITHIN_DAYS,
    days_left,
    is_signed_by,
    names_of,
    public_key_bytes,
    read_certificate,
    read_public_key,
)
from fedsgcg.deploy.coordinator.control import GONE, Control, Node, control_of
from fedsgcg.deploy.coordinator.noise import NoiseLimit
from fedsgcg.deploy.coordinator.project import Kit, Project, is_loopback
from fedsgcg.deploy.coordinator.state_cleanup import LOG_BYTES, tidy
from fedsgcg.deploy.environment import prepare_environment
from fedsgcg.deploy.monitoring.metrics import served_metrics

POLL_S: Final = 2.0
ROUTINE: Final = ("ControlServicer.ListNodes", "ControlServicer.ListRuns")
"""Log lines of the server's own polling, which would fill the log."""

LOGGERS: Final = ("flwr", "uvicorn", "uvicorn.error", "asyncio")


def serve_kit(
    path: Path,
    console: Screen,
    *,
    insecure: bool = False,
    listen: str = "",
    metrics_port: int = 0,
) -> int:
    """Serve a kit until the process is stopped.

    Args:
        path: The coordinator's kit.
        console: Console for messages about connecting and disconnecting sites.
        insecure: Without TLS and keys; an error unless everything stays on this machine.
        listen: Address to bind instead of the project's, e.g. inside a container.
        metrics_port: Port of this machine for the runs' metrics; 0 = none.

    Returns:
        The exit code.

    Raises:
        FedsgcgError: DEP-604 without a kit, DEP-607 for a certificate that sites would reject,
            DEP-608 for `insecure` outside loopback, DEP-609 for a port that is in use,
            MON-901 and MON-902 for the metrics.
    """
    # Importing Flower's server takes a second.
    from fedsgcg.deploy.coordinator.superlink import ServerOptions, serve

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
    with console.status("removing data of ended runs"):
        cleaned = tidy(kit)
    if cleaned:
        console.print(cleaned)
    server = ServerOptions(
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
        mode = "WITHOUT TLS, on this machine only" if insecure else "TLS, registered hospitals only"
        console.print(f"{project.name}: serving {host}:{server.port} ({mode})")
        console.print(f"logs: {kit.state / 'server.log'}, {kit.state / 'runs.log'}")
        watch.start()

    metrics = TelemetrySettings(port=metrics_port)
    with served_metrics(kit.runs, metrics, console):
        asyncio.run(serve(server, ready, watch.stop))
    console.print("server stopped")
    return 0


def check_insecure(project: Project, host: str) -> None:
    """Raise DEP-608 for a server without TLS that other machines could reach."""
    if is_loopback(host) and is_loopback(project.address[0]):
        return
    raise fail(
        "DEP-608",
        where=f"{host}, for hospitals {project.server}",
        found="--insecure",
        expected="127.0.0.1, ::1 or localhost in both places",
        action="leave out --insecure: provision has made the certificates",
    )


def check_certificate(kit: Kit, project: Project, console: Screen) -> None:
    """Raise DEP-607 for a server certificate that sites would reject, and warn before it expires.

    Without this check the error would appear only at the sites, which cannot renew it.
    """
    certificate = read_certificate(kit.folder / "server.crt")
    authority = read_certificate(kit.folder / "ca.crt")
    left, names = days_left(certificate), names_of(certificate)
    action = f"fedsgcg provision {kit.folder / 'project.yaml'} -o {kit.folder.parent} --renew"
    where = str(kit.folder / "server.crt")
    if left <= 0 or days_left(authority) <= 0:
        found = f"it expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        raise fail(
            "DEP-607",
            where=where,
            found=found,
            expected="a valid certificate",
            action=action,
        )
    if project.address[0] not in names:
        found = f"it is for {', '.join(names)}"
        raise fail("DEP-607", where=where, found=found, expected=project.address[0], action=action)
    if not is_signed_by(certificate, authority):
        raise fail(
            "DEP-607",
            where=where,
            found="it is signed by another authority",
            expected="a signature by the authority of ca.crt",
            action=action,
        )
    if left < RENEW_WITHIN_DAYS:
        console.print(
            f"The server's certificate expires in {left:.0f} days: {action}", style="yellow"
        )


def check_port(host: str, port: int) -> None:
    """Raise DEP-609 for a port that is in use or an address that this machine does not have."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            action = (
                "stop the other `fedsgcg serve` if one is running, or change the port in "
                "project.yaml"
            )
            raise fail(
                "DEP-609", where=f"{host}:{port}", found=error.strerror or str(error), action=action
            ) from error


def prepare_state(kit: Kit, *, insecure: bool) -> None:
    """Make the server's state folder, write logs there and configure Flower's environment.

    Flower must neither connect to the internet nor install packages.
    """
    for folder in (kit.state, kit.runs):
        folder.mkdir(exist_ok=True, mode=0o700)
    marker = kit.state / "insecure"
    marker.touch() if insecure else marker.unlink(missing_ok=True)
    prepare_environment()
    os.environ["FLWR_HOME"] = str(kit.state / "flwr")
    os.environ[KIT] = str(kit.folder)
    os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    # Run processes start in this folder; it contains no package that could shadow the bundle's.
    os.chdir(kit.state)
    handler = logging.handlers.RotatingFileHandler(
        kit.state / "server.log", maxBytes=LOG_BYTES, backupCount=5
    )
    handler.addFilter(lambda record: not record.getMessage().startswith(ROUTINE))
    handler.addFilter(NoiseLimit())
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def synchronise(kit: Kit, control: Control) -> list[str]:
    """Register the keys of the kit's `keys/` at the server and unregister all others.

    Returns:
        A description of each change.
    """
    wanted = {path.stem: read_public_key(path) for path in sorted(kit.keys.glob("*.pub"))}
    keys = {public_key_bytes(line): site for site, line in wanted.items()}
    nodes = [node for node in control.nodes() if node.status != GONE]
    changes = []
    for node in nodes:
        if keys.get(node.key) != node.site:
            control.unregister(node.node)
            changes.append(f"{node.site}: unregistered, cannot join any more")
    registered = {node.key for node in nodes if keys.get(node.key) == node.site}
    for key, site in keys.items():
        if key not in registered:
            control.register(site, wanted[site])
            changes.append(f"{site}: registered, may join")
    return changes


def end_orphan(kit: Kit, control: Control) -> int:
    """Stop a run that a killed server has left behind; the run's process died with that server.

    Without this, Flower takes a minute to notice and refuses the next run in the meantime.

    Returns:
        The run id, 0 when there is no such run.
    """
    try:
        run_id = kit.last_run().run_id
        state = control.run(run_id)
        if state is None or state.over:
            return 0
        control.stop(run_id)
    except FedsgcgError:
        return 0  # no run was submitted, or a server problem that the next poll reports
    return run_id


@dataclass
class Watch:
    """Keeps the server's registrations equal to the kit's keys and reports changes of sites.

    Args:
        kit: The kit.
        console: Console for the reports.
    """

    kit: Kit
    console: Screen
    _seen: dict[str, str] = field(default_factory=dict)
    _stamp: float = -1.0
    _problem: str = ""
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start watching in a separate thread."""
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching; returns at once, because the server's event loop may be the caller."""
        self._ended.set()

    def _watch(self) -> None:
        with control_of(self.kit) as control:
            if run_id := end_orphan(self.kit, control):
                self._print(
                    f"run {run_id} was interrupted when the server ended; "
                    f"resume it with fedsgcg resume {self.kit.folder}"
                )
            while True:
                self._poll(control)
                if self._ended.wait(POLL_S):
                    return

    def _poll(self, control: Control) -> None:
        """Update once; a problem is printed once and does not stop the server."""
        try:
            self.update(control)
            self._problem = ""
        except FedsgcgError as error:
            problem = str(error)
            if problem != self._problem and not self._ended.is_set():
                self._print(problem)
            self._problem = problem

    def update(self, control: Control) -> None:
        """Register changed keys, and print whose status changed."""
        stamp = self.kit.keys.stat().st_mtime
        if stamp != self._stamp:
            for change in synchronise(self.kit, control):
                self._print(change)
            self._stamp = stamp
        statuses = {node.site: node.status for node in control.nodes() if node.status != GONE}
        for site in sorted(statuses):
            if self._seen.get(site, "registered") != statuses[site]:
                self._print(f"{site} is {statuses[site]}")
        self._seen = statuses

    def _print(self, message: str) -> None:
        clock = time.strftime("%H:%M:%S")
        self.console.print(f"{clock}  {message}")


def presence(nodes: list[Node], sites: tuple[str, ...]) -> Mapping[str, str]:
    """Return site -> `online`, `offline`, `never connected` or `not registered`."""
    known = {node.site: node.status for node in nodes if node.status != GONE}
    labels = {"registered": "never connected", "": "not registered"}
    statuses = {site: known.get(site, "") for site in sites}
    return {site: labels.get(status, status) for site, status in statuses.items()}
