"""The public port: limits on requests and their bodies before anybody is authenticated.

Flower reads a whole body before it checks a signature. Here a body is read only up to the limit of
its path, which is small unless the head carries the signature of a registered hospital, and a
hospital has a limited number of large requests in progress. Connections have limits of their own
(`deploy.coordinator.public_server`).
"""

from __future__ import annotations

import asyncio
import binascii
import datetime
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
IsRegistered = Callable[[bytes], bool]

OBJECTS: Final = "/v1/fleet/push-object"
MESSAGES: Final = "/v1/fleet/push-messages"
PULLED: Final = "/v1/fleet/pull-object"
LARGE: Final = frozenset(
    {OBJECTS, MESSAGES, PULLED, "/v1/fleet/pull-messages", "/v1/fleet/get-fab"}
)
"""Paths whose body or response may be large."""
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
        idle_s: Seconds between two parts of a body, and in which nothing of a response is taken.
        body_s: Seconds for a whole body (for one from a stranger `head_s`), and for a whole
            response.
        at_once: Requests of one hospital in progress that may be large (`LARGE`).
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
    at_once: int = 16
    stranger_bytes: int = 65_536
    bodies: Mapping[str, int] = field(
        # Arrays travel in parts of 5 MiB; the Arrow bytes of a message are one object.
        default_factory=lambda: {OBJECTS: 128 * MIB, MESSAGES: 16 * MIB}
    )


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
        self._busy: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
        known = scope["path"] in LARGE and await self._is_known(headers)
        key = headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower(), b"")
        if not known:
            await self._handle(scope, receive, send, known=False)
        elif self._busy[key] >= self._limits.at_once:
            await _answer(send, RefusedError(429, "too many requests at once"))
        else:
            self._busy[key] += 1
            try:
                await self._handle(scope, receive, send, known=True)
            finally:
                self._busy[key] -= 1
                if not self._busy[key]:
                    del self._busy[key]

    async def _handle(self, scope: Scope, receive: Receive, send: Send, *, known: bool) -> None:
        started = False

        async def sending(event: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(event)

        try:
            body = self._body(scope, receive, known)
            await self._app(scope, body, sending)
        except RefusedError as error:
            if not started:
                await _answer(send, error)

    def _body(self, scope: Scope, receive: Receive, known: bool) -> Receive:
        """Return `receive` with the limits of this request; raises RefusedError for its head."""
        headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
        most = self._limits.stranger_bytes
        if known:
            most = self._limits.bodies.get(scope["path"], most)
        stated = _length(headers)
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
