"""A TCP proxy between a hospital and the server whose link can be slow, lossy or cut."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from dataclasses import dataclass, field

SEGMENT = 1448
"""Bytes of a TCP segment on Ethernet."""

RETRANSMISSION_S = 0.2
"""Smallest retransmission time-out of Linux: what one lost segment costs a TCP connection."""

CHUNK = 16384
QUEUED = 64


@dataclass
class Direction:
    """One direction of a link, shared by its connections.

    Attributes:
        busy_until: Time of the event loop until which the link is sending.
        passed: Bytes so far.
    """

    busy_until: float = 0.0
    passed: int = 0


@dataclass
class Link:
    """A link to 127.0.0.1:`target`.

    The proxy sees connections, not packets. A lost segment is therefore what it is to a program:
    the bytes after it come a retransmission time-out later.

    Attributes:
        target: Port of the server.
        delay_s: Delay of each direction in seconds.
        rate: Bytes per second of each direction, 0 = unlimited.
        loss: Share of lost segments.
        seed: Of the lost segments.
        lost: Segments lost so far.
    """

    target: int
    delay_s: float = 0.0
    rate: float = 0.0
    loss: float = 0.0
    seed: int = 0
    lost: int = 0
    port: int = 0
    up: Direction = field(default_factory=Direction)
    down: Direction = field(default_factory=Direction)

    def __enter__(self) -> Link:
        self._random = random.Random(self.seed)
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def cut(self) -> None:
        """Break all connections; new ones hang, as behind a firewall that drops packets."""
        self._open = False
        self._loop.call_soon_threadsafe(self._abort)

    def restore(self) -> None:
        """Return to a fast link without loss."""
        self.delay_s = self.rate = self.loss = 0.0
        self._open = True

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _connect(self, near: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        while not self._open:
            await asyncio.sleep(0.1)
        try:
            far, into = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            out.close()
            return
        both = {out, into}
        self._writers |= both
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._pass(near, into, self.up), self._pass(far, out, self.down))
        self._writers -= both
        for writer in both:
            writer.close()

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: Direction
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED)
        sending = asyncio.ensure_future(self._send(queue, sink, direction))
        try:
            while data := await source.read(CHUNK):
                await queue.put((self._due(len(data), direction), data))
            await queue.put((0.0, b""))
            await sending
        finally:
            sending.cancel()

    async def _send(
        self,
        queue: asyncio.Queue[tuple[float, bytes]],
        sink: asyncio.StreamWriter,
        direction: Direction,
    ) -> None:
        broken = False
        while True:
            due, data = await queue.get()
            if not data:
                break
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            try:
                if not broken:
                    sink.write(data)
                    await sink.drain()
                    direction.passed += len(data)
            except OSError:
                broken = True  # keep emptying the queue, so that the reader ends
        with contextlib.suppress(OSError):
            sink.write_eof()

    def _due(self, size: int, direction: Direction) -> float:
        """Time at which some bytes reach the other end."""
        now = self._loop.time()
        start = max(now, direction.busy_until)
        lost = sum(self._random.random() < self.loss for _ in range(-(-size // SEGMENT)))
        self.lost += lost
        sending_s = size / self.rate if self.rate else 0.0
        direction.busy_until = start + sending_s + lost * RETRANSMISSION_S
        return direction.busy_until + self.delay_s
