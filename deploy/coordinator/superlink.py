"""Flower's SuperLink on two ports: the Fleet API for sites, all others on loopback only.

Flower 1.41 serves the Fleet, Control and Runtime APIs on one port, and without an identity
provider it accepts every account: whoever can reach the port can submit code to all sites. So the
same application is served twice in one process. The public port serves only the paths of the Fleet
API (`FleetOnly`), within the limits of `deploy.coordinator.front`. 127.0.0.1 serves all paths,
where the Control API requires the coordinator's token and the Runtime API the executor's secret.

This module, `executor`, `reconnect`, `store_limit` and `state_cleanup` are the only ones here that
depend on the internals of Flower's server; flwr is pinned to one minor version.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvicorn
from flwr.common.constant import ACCESS_TOKEN_KEY, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.superlink.auth_plugin import ControlAuthnPlugin, NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.router import router as fleet_router

from fedsgcg.deploy.coordinator.executor import executor_command
from fedsgcg.deploy.coordinator.front import (
    Application,
    BoundedBodies,
    Limits,
    Receive,
    Scope,
    Send,
)
from fedsgcg.deploy.coordinator.public_server import public_server, raise_descriptors
from fedsgcg.deploy.coordinator.reconnect import Reconnections
from fedsgcg.deploy.coordinator.store_limit import StoreBound, StoreLimits

LOOPBACK: Final = "127.0.0.1"
GRACE_S: Final = 5.0
SPARE_DESCRIPTORS: Final = 256
"""Open files left for the database, the logs and the coordinator's own port."""

REFUSAL: Final = b"only registered hospitals are served here\n"


@dataclass(frozen=True)
class ServerOptions:
    """Addresses, certificates and files of the SuperLink.

    Attributes:
        host: Public address.
        port: Public port.
        control_port: Port on 127.0.0.1 for the coordinator and its own processes.
        ca: Certificate of the authority; None serves without TLS and without site keys (loopback
            only).
        certificate: The server's certificate.
        key: Private key of the certificate.
        token: The coordinator's token.
        executor_secret: File with the secret with which the executor acquires runs.
        database: Flower's database.
        log: Log file of the run processes.
        limits: Limits of the public port.
        store: What one hospital may have stored.
    """

    host: str
    port: int
    control_port: int
    ca: Path | None
    certificate: Path
    key: Path
    token: str
    executor_secret: Path
    database: Path
    log: Path
    limits: Limits = field(default_factory=Limits)
    store: StoreLimits = field(default_factory=StoreLimits)

    @property
    def tls(self) -> dict[str, str]:
        """Uvicorn's arguments for TLS; empty without an authority."""
        if not self.ca:
            return {}
        return {"ssl_certfile": str(self.certificate), "ssl_keyfile": str(self.key)}


class FleetOnly:
    """Passes on only requests to the Fleet API's paths, matched exactly, and to `/health`.

    Args:
        app: The SuperLink's application.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self.paths = frozenset(
            {"/health", *(str(getattr(route, "path", "")) for route in fleet_router.routes)}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "http" and scope["path"] in self.paths:
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http":
            await send(
                {
                    "type": "http.response.start",
                    "status": 403,
                    "headers": [(b"content-type", b"text/plain")],
                }
            )
            await send({"type": "http.response.body", "body": REFUSAL})
            return
        await send({"type": "websocket.close", "code": 1008})


class TokenPlugin(ControlAuthnPlugin):  # type: ignore[misc, unused-ignore]
    """Allows only requests with the coordinator's token to the Control API.

    Args:
        token: The token.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._account = NoOpControlAuthnPlugin()

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        """Return None: there is no login, because the token is a file of the kit."""
        return None

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Compare the bearer token of a request in constant time."""
        for name, value in metadata:
            given = value.encode() if isinstance(value, str) else value
            if name == ACCESS_TOKEN_KEY and hmac.compare_digest(given, self._token):
                valid, account = self._account.validate_tokens_in_metadata(metadata)
                return bool(valid), account
        return False, None

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        """Raise an error: the server issues no tokens."""
        raise FlowerError(ApiErrorCode.NO_ACCOUNT_AUTH, "This server issues no tokens.")

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """Return nothing: the token does not change."""
        return None, None


class QuietServer(uvicorn.Server):
    """The server of the coordinator's own port; `serve` handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: two servers in one process would overwrite each other's handlers."""
        yield


def superlink_app(options: ServerOptions) -> Any:
    """Build the SuperLink's application; its Control API requires the coordinator's token."""
    certificates = None
    if options.ca:
        certificates = (
            options.ca.read_bytes(),
            options.certificate.read_bytes(),
            options.key.read_bytes(),
        )
    config = SuperLinkLifespanConfig(
        control_address=f"{LOOPBACK}:{options.control_port}",
        health_server_address=None,
        host=LOOPBACK,
        port=options.control_port,
        insecure=options.ca is None,
        certificates=certificates,
        superexec_auth_secret=options.executor_secret.read_bytes(),
        authn_plugin=TokenPlugin(options.token),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=options.ca is not None,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(options.ca) if options.ca else None,
        ssl_certfile=str(options.certificate) if options.ca else None,
        ssl_keyfile=str(options.key) if options.ca else None,
        database=str(options.database),
        # In Flower's `subprocess` mode every process on this machine could claim a run's token.
        isolation="process",
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    app.dependency_overrides[get_linkstate] = Reconnections(StoreBound(options.store))
    return app


async def serve(
    options: ServerOptions, on_ready: Callable[[], None], on_stop: Callable[[], None]
) -> None:
    """Serve both ports until SIGTERM or SIGINT; then end the executor and all run processes.

    Args:
        options: Addresses, certificates and files.
        on_ready: Called once both ports accept connections.
        on_stop: Called when shutdown begins.
    """
    app = superlink_app(options)
    common: dict[str, Any] = {"log_config": None, "access_log": False, "workers": 1, **options.tls}
    inner = QuietServer(uvicorn.Config(app, host=LOOPBACK, port=options.control_port, **common))
    limits = options.limits
    most = raise_descriptors(65_536) - SPARE_DESCRIPTORS
    limits = replace(limits, connections=max(1, min(limits.connections, most)))
    known = partial(is_registered, app) if options.ca else None
    public = BoundedBodies(FleetOnly(app), limits, known)
    outer = public_server(public, options.host, options.port, limits, options.tls)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        on_stop()
        inner.should_exit = outer.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    tasks = [asyncio.create_task(server.serve()) for server in (inner, outer)]
    executor = None
    try:
        while not (inner.started and outer.started) and not any(task.done() for task in tasks):
            await asyncio.sleep(0.05)
        if inner.started and outer.started:
            executor = start_executor(options)
            on_ready()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        end_group(executor)
        stop()
        await asyncio.wait(tasks, timeout=GRACE_S)


def is_registered(app: Any, key: bytes) -> bool:
    """Return whether a public key (PEM) belongs to a registered hospital."""
    return app.state.linkstate_factory.state().get_node_id_by_public_key(key) is not None


def start_executor(options: ServerOptions) -> subprocess.Popen[bytes]:
    """Start the executor in its own session, so that it can be ended with its children."""
    address = f"{LOOPBACK}:{options.control_port}"
    command = executor_command(address, options.ca, options.executor_secret)
    with options.log.open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - this program's own module
            command, stdout=log, stderr=log, start_new_session=True
        )


def end_group(process: subprocess.Popen[bytes] | None) -> None:
    """End a process and everything it started in its session."""
    if process is None:
        return
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
