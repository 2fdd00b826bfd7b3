"""The server of the public port: limits on connections, and deadlines for what they ask and take.

Uvicorn neither limits connections, nor closes one that never asks anything, nor one that never
reads its response. So connections are accepted here, with a limit for each address and for all;
each must send the head of a request in time, and take its response in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedsgcg.deploy.coordinator.front import Application, Limits

LOG = logging.getLogger("uvicorn.error")


def raise_descriptors(wanted: int) -> int:
    """Raise this process's limit of open files as far as allowed; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return wanted if soft == resource.RLIM_INFINITY else soft


class BoundedProtocol(H11Protocol):
    """Uvicorn's HTTP protocol with deadlines for the head of a request and for its response.

    The peer must take something of a response in every `idle_s`, and all of it in `body_s`. A
    connection between two requests counts from when nothing of the last response is left.
    """

    limits: Limits = Limits()
    waiting: asyncio.TimerHandle | None = None
    taking: asyncio.TimerHandle | None = None
    taken: bool = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the head of the first request."""
        super().connection_made(transport)
        self.await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self.stop_waiting()
        self.stop_taking()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Stop waiting when a request has begun."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self.stop_waiting()

    def on_response_complete(self) -> None:
        """Wait until the response was taken and for the head of the next request."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self.await_head()
            self.await_taking()

    def pause_writing(self) -> None:
        """Wait until the peer takes more of the response."""
        super().pause_writing()
        self.await_taking()

    def resume_writing(self) -> None:
        """Note that the peer has taken something."""
        super().resume_writing()
        self.taken = True

    def await_head(self) -> None:
        """Close the connection unless a request begins in time."""
        self.stop_waiting()
        self.waiting = self.loop.call_later(self.limits.head_s, self._without_head)

    def stop_waiting(self) -> None:
        """Cancel the deadline of the head."""
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def _without_head(self) -> None:
        if self.transport.get_write_buffer_size():  # `await_taking` watches it
            self.await_head()
        else:
            self.transport.abort()

    def await_taking(self) -> None:
        """Close the connection unless the peer takes what was written in time."""
        if self.taking is None:
            self._look(None, 0.0, None)

    def stop_taking(self) -> None:
        """Cancel the deadlines of the response."""
        if self.taking is not None:
            self.taking.cancel()
            self.taking = None

    def _look(self, cycle: object, end: float, before: int | None) -> None:
        """Abort if nothing was taken since the last look, or not everything until `end`.

        Args:
            cycle: The request of the last look.
            end: Time of the event loop until which its response must have been taken.
            before: Bytes that waited then; None if the application may have written since.
        """
        left, now_s = self.transport.get_write_buffer_size(), self.loop.time()
        self.taking = None
        if not left:
            return
        if cycle is not self.cycle:
            end, before = now_s + self.limits.body_s, None
        stalled = before is not None and left >= before and not self.taken
        if stalled or now_s >= end:
            self.transport.abort()
            return
        self.taken = False
        # Nothing is written while the application waits for room, and after the response's end.
        still = self.flow.write_paused or (self.cycle is None or self.cycle.response_complete)
        self.taking = self.loop.call_later(
            self.limits.idle_s, self._look, self.cycle, end, left if still else None
        )


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
        protocol = _Counted(self, partial(self._release, peer), self._limits)
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

    def __init__(
        self, server: uvicorn.Server, released: Callable[[], None], limits: Limits
    ) -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state)
        self.limits = limits
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
