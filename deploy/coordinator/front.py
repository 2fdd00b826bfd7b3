"""The public port: limits on connections, headers and bodies before anybody is authenticated.

Flower reads a whole body before it checks a signature, and uvicorn neither limits connections nor
closes one that never asks anything. So connections are accepted here, with a limit for each address
and for all; each must send the head of a request in time; and a body is read only up to the limit
of its path, which is small unless the head carries the signature of a registered hospital.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import datetime
import logging
import resource
import socket
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import uvicorn
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from uvicorn.protocols.http.h11_impl import H11Protocol

LOG = logging.getLogger("uvicorn.error")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
IsRegistered = Callable[[bytes], bool]

OBJECTS: Final = "/v1/fleet/push-object"
MESSAGES: Final = "/v1/fleet/push-messages"
MIB: Final = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of the public port.

    Attributes:
        address: Connections of one address. Several hospitals may share one behind a gateway.
        connections: Connections in all.
        handshake_s: Seconds for the TLS handshake.
        head_s: Seconds until the head of a request is complete, from the start of the connection or
            from the end of the last response.
        head_bytes: Bytes of a head.
        idle_s: Seconds between two parts of a body.
        body_s: Seconds for a whole body; for one from a stranger `head_s`.
        stranger_bytes: Bytes of a body without the signature of a registered hospital.
        bodies: Path -> bytes of a body from a registered hospital, else `stranger_bytes`.
    """

    address: int = 128
    connections: int = 1024
    handshake_s: float = 10.0
    head_s: float = 20.0
    head_bytes: int = 32_768
    idle_s: float = 60.0
    body_s: float = 3600.0
    stranger_bytes: int = 65_536
    bodies: Mapping[str, int] = field(
        # Arrays travel in parts of 5 MiB; the Arrow bytes of a message are one object.
        default_factory=lambda: {OBJECTS: 128 * MIB, MESSAGES: 16 * MIB}
    )


def raise_descriptors(wanted: int) -> int:
    """Raise this process's limit of open files as far as allowed; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return wanted if soft == resource.RLIM_INFINITY else soft


class RefusedError(Exception):
    """A body that is not read: the HTTP status and its reason."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(reason)


class BoundedBodies:
    """Passes on requests whose bodies keep the limits; others get 408 or 413 and are closed.

    Args:
        app: The application.
        limits: The limits.
        is_registered: Whether a public key (PEM) belongs to a registered hospital; None for a
            server without keys, which is on loopback.
    """

    def __init__(
        self, app: Application, limits: Limits, is_registered: IsRegistered | None
    ) -> None:
        self._app = app
        self._limits = limits
        self._is_registered = is_registered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def sending(event: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(event)

        try:
            body = await self._body(scope, receive)
            await self._app(scope, body, sending)
        except RefusedError as error:
            if not started:
                await _answer(send, error)

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """Return `receive` with the limits of this request; raises RefusedError for its head."""
        headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
        most = self._limits.stranger_bytes
        stated = _length(headers)
        known = False
        # Most requests are short, and Flower checks their signatures itself.
        if (stated is None or stated > most) and scope["path"] in self._limits.bodies:
            known = await self._is_known(headers)
            most = self._limits.bodies[scope["path"]] if known else most
        if stated is not None and stated > most:
            raise RefusedError(413, f"a body of at most {most} bytes is accepted here")
        return self._bounded(receive, most, self._limits.body_s if known else self._limits.head_s)

    async def _is_known(self, headers: Mapping[str, bytes]) -> bool:
        if self._is_registered is None:
            return True
        return await asyncio.to_thread(signed_by, headers, self._is_registered)

    def _bounded(self, receive: Receive, most: int, seconds: float) -> Receive:
        end, size, complete = asyncio.get_running_loop().time() + seconds, 0, False

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal size, complete
            if complete:  # the application waits for the end of the connection
                return await receive()
            left = min(self._limits.idle_s, end - asyncio.get_running_loop().time())
            try:
                event = await asyncio.wait_for(receive(), max(0.0, left))
            except TimeoutError as error:
                raise RefusedError(408, "the body came too slowly") from error
            size += len(event.get("body", b""))
            if size > most:
                raise RefusedError(413, f"a body of at most {most} bytes is accepted here")
            complete = not event.get("more_body", False)
            return event

        return bounded


async def _answer(send: Send, error: RefusedError) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{error.reason}\n".encode()})


def _length(headers: Mapping[str, bytes]) -> int | None:
    """Return the stated length of a body, None when the head does not say it."""
    text = headers.get("content-length", b"")
    if not text:
        return None if "transfer-encoding" in headers else 0
    return int(text) if text.isdigit() and len(text) < 19 else 2**63


def signed_by(headers: Mapping[str, bytes], is_registered: IsRegistered) -> bool:
    """Return whether the head carries a fresh signature of a registered hospital's key.

    Flower checks it again, together with the body.
    """
    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower()], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.lower()], validate=True)
        stamp = headers[TIMESTAMP_HEADER.lower()].decode("ascii")
        age = (now() - datetime.datetime.fromisoformat(stamp)).total_seconds()
        fresh = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
        valid = fresh and verify_signature(
            bytes_to_public_key(key), stamp.encode("ascii"), signature
        )
        return bool(valid) and is_registered(key)
    except (KeyError, ValueError, TypeError, UnicodeError, binascii.Error, AttributeError):
        return False


class BoundedProtocol(H11Protocol):
    """Uvicorn's HTTP protocol with a deadline for the head of every request."""

    head_s: float = Limits.head_s
    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the head of the first request."""
        super().connection_made(transport)
        self.await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self.stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Stop waiting when a request has begun."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self.stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the head of the next request."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self.await_head()

    def await_head(self) -> None:
        """Close the connection unless a request begins in time."""
        self.stop_waiting()
        self.waiting = self.loop.call_later(self.head_s, self.transport.abort)

    def stop_waiting(self) -> None:
        """Cancel the deadline of the head."""
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


class PublicServer(uvicorn.Server):
    """A uvicorn server that accepts connections itself, within limits.

    A connection counts from the moment it is accepted, also during its TLS handshake.

    Args:
        config: Uvicorn's configuration, made by `public_config`.
        limits: The limits.
    """

    def __init__(self, config: uvicorn.Config, limits: Limits) -> None:
        super().__init__(config)
        self._limits = limits
        self._open: Counter[str] = Counter()
        self._accepting: list[asyncio.Task[None]] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._listening: list[socket.socket] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: `serve` handles signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the configured address."""
        await self.lifespan.startup()
        self.servers = []
        host = self.config.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server(
            (host, self.config.port), family=family, backlog=self.config.backlog
        )
        listener.setblocking(False)
        self._listening.append(listener)
        self._accepting.append(asyncio.create_task(self._accept(listener)))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, then end as uvicorn does."""
        for task in (*self._accepting, *self._connecting):
            task.cancel()
        for listener in self._listening:
            listener.close()
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                link, address = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left: the next may be free in a moment
                LOG.warning("a connection could not be accepted: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            peer = str(address[0])
            if not self._admits(peer):
                LOG.warning("a connection was refused: too many are open")
                link.close()
                continue
            self._open[peer] += 1
            task = asyncio.create_task(self._connect(link, peer))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _admits(self, peer: str) -> bool:
        total = self._open.total()
        return self._open[peer] < self._limits.address and total < self._limits.connections

    def _release(self, peer: str) -> None:
        self._open[peer] -= 1
        if self._open[peer] <= 0:
            del self._open[peer]

    async def _connect(self, link: socket.socket, peer: str) -> None:
        """Shake hands and hand the connection to uvicorn's protocol."""
        secure = self.config.ssl
        protocol = _Counted(self, partial(self._release, peer), self._limits.head_s)
        try:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                link,
                ssl=secure,
                ssl_handshake_timeout=self._limits.handshake_s if secure else None,
            )
        except (OSError, asyncio.CancelledError):  # ssl.SSLError and TimeoutError are OSErrors
            link.close()
            protocol.release()


class _Counted(BoundedProtocol):
    """A connection that releases its place when it has ended."""

    def __init__(self, server: uvicorn.Server, released: Callable[[], None], head_s: float) -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state)
        self.head_s = head_s
        self._released: Callable[[], None] | None = released

    def release(self) -> None:
        """Release the place once, however often it is called."""
        released, self._released = self._released, None
        if released is not None:
            released()

    def connection_lost(self, exc: Exception | None) -> None:
        self.release()
        super().connection_lost(exc)


def public_server(
    app: Application, host: str, port: int, limits: Limits, tls: Mapping[str, str]
) -> PublicServer:
    """Return the server of the public port.

    Args:
        app: What it serves.
        host: Address to bind.
        port: Port to bind.
        limits: The limits.
        tls: Uvicorn's arguments for TLS, empty without.
    """
    more: dict[str, Any] = dict(tls)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="off",
        log_config=None,
        access_log=False,
        ws="none",
        h11_max_incomplete_event_size=limits.head_bytes,
        **more,
    )
    return PublicServer(config, limits)
