"""A TCP proxy between a hospital and the server: a link that a test can break and restore."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from types import TracebackType


class Proxy:
    """Passes bytes on to the server while the link is intact.

    A broken link drops every connection. New ones hang until it is restored, as behind a firewall
    that drops packets.

    Args:
        target: Port of 127.0.0.1, or a Unix socket.
        listen: The same for the near end; 0 = any free port.

    Attributes:
        passed: Bytes so far.
    """

    def __init__(self, target: int | Path, listen: int | Path = 0) -> None:
        self._target = target
        self._listener = _listener(listen)
        self.passed = 0
        self._whole = threading.Event()
        self._whole.set()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut()
        self._listener.close()

    @property
    def port(self) -> int:
        """Port of the near end."""
        return int(self._listener.getsockname()[1])

    def cut(self) -> None:
        """Break all connections and let new ones hang."""
        self._whole.clear()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections through again."""
        self._whole.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._whole.wait(120)
        try:
            far = _connection(self._target)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._lock:
            self._open |= {near, far}
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
                self.passed += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        with self._lock:
            self._open -= {source, sink}


def _listener(place: int | Path) -> socket.socket:
    if isinstance(place, int):
        return socket.create_server(("127.0.0.1", place))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen()
    return listener


def _connection(place: int | Path) -> socket.socket:
    if isinstance(place, int):
        return socket.create_connection(("127.0.0.1", place), timeout=5)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(str(place))
    return connection
