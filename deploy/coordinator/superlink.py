"""Flower's SuperLink behind two doors: hospitals reach the Fleet API alone, the coordinator the rest from loopback.

Flower 1.41 serves Fleet, Control and Runtime APIs on one port, and its only account check without an identity provider
accepts everybody: whoever can reach the port can submit code to all hospitals (stack.md 3.2). So the same application
is served twice in one process: on the public port through `FleetOnly`, which knows the Fleet API's paths and nothing
else, and on 127.0.0.1 with all paths, where the Control API wants the coordinator's credential and the Runtime API the
executor's. Only this module and `deploy.coordinator.state_cleanup` know Flower's server from inside; flwr is pinned to
one minor version.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn
from flwr.common.constant import ACCESS_TOKEN_KEY, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.superlink.auth_plugin import ControlAuthnPlugin, NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.router import router as fleet_router

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK: Final = "127.0.0.1"
GRACE_S: Final = 5.0
REFUSAL: Final = b"only registered hospitals are served here\n"


@dataclass(frozen=True)
class Doors:
    """Where and with what the SuperLink is served.

    Attributes:
        host: Address of the public door.
        port: Its port.
        control_port: Port on 127.0.0.1 for the coordinator and its own processes.
        ca: Certificate of the authority; None serves without TLS and without hospitals' keys (loopback only).
        certificate: The server's certificate.
        key: Its key.
        token: The coordinator's credential.
        executor_secret: File of the secret that Flower's executor shows to the Runtime API.
        database: Flower's database.
        log: Where the processes of runs write.
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

    @property
    def tls(self) -> dict[str, str]:
        """Arguments of uvicorn for TLS, none without an authority."""
        return (
            {"ssl_certfile": str(self.certificate), "ssl_keyfile": str(self.key)} if self.ca else {}
        )


class FleetOnly:
    """Lets through the requests of hospitals: the Fleet API's own paths, literally, and the health of the server.

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
    """Lets the holder of the coordinator's credential use the Control API, and nobody else.

    Args:
        token: The credential.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._account = NoOpControlAuthnPlugin()

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        """There is no login: the credential is a file of the coordinator's kit."""
        return None

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Compare the bearer token of a request, in a time that does not depend on it."""
        for name, value in metadata:
            given = value.encode() if isinstance(value, str) else value
            if name == ACCESS_TOKEN_KEY and hmac.compare_digest(given, self._token):
                valid, account = self._account.validate_tokens_in_metadata(metadata)
                return bool(valid), account
        return False, None

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        """Refuse: tokens are not handed out."""
        raise FlowerError(ApiErrorCode.NO_ACCOUNT_AUTH, "Tokens are not handed out.")

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """Refuse: the credential does not change."""
        return None, None


class QuietServer(uvicorn.Server):
    """A uvicorn server that leaves signals to the one who started both."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: two servers in one process would fight for the handlers."""
        yield


def superlink_app(doors: Doors) -> Any:
    """Build the SuperLink's application with the coordinator's credential in front of its Control API."""
    certificates = None
    if doors.ca:
        certificates = (
            doors.ca.read_bytes(),
            doors.certificate.read_bytes(),
            doors.key.read_bytes(),
        )
    config = SuperLinkLifespanConfig(
        control_address=f"{LOOPBACK}:{doors.control_port}",
        health_server_address=None,
        host=LOOPBACK,
        port=doors.control_port,
        insecure=doors.ca is None,
        certificates=certificates,
        superexec_auth_secret=doors.executor_secret.read_bytes(),
        authn_plugin=TokenPlugin(doors.token),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=doors.ca is not None,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(doors.ca) if doors.ca else None,
        ssl_certfile=str(doors.certificate) if doors.ca else None,
        ssl_keyfile=str(doors.key) if doors.ca else None,
        database=str(doors.database),
        # In Flower's `subprocess` mode the executor, and with it everybody on this machine, may claim a run's token.
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def executor_command(doors: Doors) -> list[str]:
    """Command of Flower's executor, which starts the coordinator's app as a process for each run."""
    trust = ["--root-certificates", str(doors.ca)] if doors.ca else ["--insecure"]
    return [
        "flower-superexec",
        *trust,
        *("--runtime-api-address", f"{LOOPBACK}:{doors.control_port}"),
        *("--superexec-auth-secret-file", str(doors.executor_secret)),
        *("--parent-pid", str(os.getpid())),
    ]


async def serve(doors: Doors, on_ready: Callable[[], None], on_stop: Callable[[], None]) -> None:
    """Serve both doors until SIGTERM or SIGINT; then end the executor and every run's process.

    Args:
        doors: Where.
        on_ready: Called once both doors are open.
        on_stop: Called when the end begins.
    """
    app = superlink_app(doors)
    common: dict[str, Any] = {"log_config": None, "access_log": False, "workers": 1, **doors.tls}
    inner = QuietServer(uvicorn.Config(app, host=LOOPBACK, port=doors.control_port, **common))
    outer = QuietServer(
        uvicorn.Config(FleetOnly(app), host=doors.host, port=doors.port, lifespan="off", **common)
    )
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
            executor = start_executor(doors)
            on_ready()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        end_group(executor)
        stop()
        await asyncio.wait(tasks, timeout=GRACE_S)


def start_executor(doors: Doors) -> subprocess.Popen[bytes]:
    """Start Flower's executor in a session of its own, so that it can be ended with all that it starts."""
    with doors.log.open("ab") as log:
        return subprocess.Popen(  # noqa: S603
            executor_command(doors), stdout=log, stderr=log, start_new_session=True
        )


def end_group(process: subprocess.Popen[bytes] | None) -> None:
    """End a process and all that it started in its own session, by its id."""
    if process is None:
        return
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
