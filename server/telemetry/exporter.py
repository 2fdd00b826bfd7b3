"""Serves the metrics of run folders to Prometheus: an endpoint, a text file or a push gateway.

A thread polls the run folders; a scrape returns what the last poll found. A scraper that is slow or
hangs occupies one of a few threads for a few seconds and nothing else.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from fedsgcg.common.errors import fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.server.telemetry.follow import Follower
from fedsgcg.server.telemetry.names import METRICS
from fedsgcg.server.telemetry.state import Sample

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric as Family

POLL_S: Final = 1.0
REQUEST_S: Final = 10.0
"""Seconds after which a connection is closed that sends or reads nothing."""

MOST_REQUESTS: Final = 8
"""Requests that are answered at the same time; more are closed."""

PUSH_S: Final = 10.0
LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True)
class Targets:
    """Where the metrics go.

    Attributes:
        port: Port of the endpoint `/metrics`; None for no endpoint, 0 for any free port.
        address: Address of the endpoint. Every host that can reach it can read the metrics.
        textfile: File for the node exporter's textfile collector; None for none.
        pushgateway: Address of a push gateway, `http://host:9091`; "" for none.
    """

    port: int | None = None
    address: str = LOOPBACK
    textfile: Path | None = None
    pushgateway: str = ""


class Exporter:
    """Follows a folder and serves its metrics, between `start` and `stop`.

    Args:
        folder: Folder of a study, of several studies, or of a kit's runs.
        targets: Where the metrics go.

    Attributes:
        problems: What a target refused in the last poll, by target; a later success removes it.

    Raises:
        FedsgcgError: MON-901 without prometheus-client, MON-902 for a port that cannot be used.
    """

    def __init__(self, folder: Path, targets: Targets) -> None:
        self.problems: dict[str, str] = {}
        self._targets = targets
        self._follower = Follower(folder)
        self._samples: Sequence[Sample] = ()
        self._stop = threading.Event()
        self._registry = _registry(self)
        self._server = _listen(targets, self._registry) if targets.port is not None else None
        self._thread = threading.Thread(target=self._watch, name="metrics", daemon=True)

    @property
    def url(self) -> str:
        """Address of the endpoint, "" without one."""
        if self._server is None:
            return ""
        host = self._targets.address
        return f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}/metrics"

    def start(self) -> None:
        """Poll once, then in a thread every `POLL_S` seconds, and serve."""
        self.poll()
        self._thread.start()
        if self._server is not None:
            serve = self._server.serve_forever
            threading.Thread(target=serve, name="metrics endpoint", daemon=True).start()

    def stop(self) -> None:
        """Poll a last time and end the endpoint."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self.poll()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def poll(self) -> None:
        """Read what is new in the run folders and write the text file or push."""
        self._samples = self._follower.poll(time.time())
        if self._targets.textfile is not None:
            self._write(self._targets.textfile)
        if self._targets.pushgateway:
            self._push(self._targets.pushgateway)

    def collect(self) -> Iterator[Family]:
        """Yield the metrics of the last poll; prometheus-client calls it at each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        values: dict[str, list[tuple[Sequence[str], float]]] = {}
        for name, labels, value in self._samples:
            values.setdefault(name, []).append((labels, value))
        for metric in METRICS:
            kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
            family = kind(metric.name, metric.help, labels=metric.labels)
            for found, value in values.get(metric.name, ()):
                family.add_metric(found, value)
            yield family

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self.poll()

    def _write(self, path: Path) -> None:
        from prometheus_client import generate_latest

        try:
            write_file(path, generate_latest(self._registry))
            self.problems.pop("textfile", None)
        except OSError as error:
            self.problems["textfile"] = f"{path}: {error.strerror or error}"

    def _push(self, gateway: str) -> None:
        from prometheus_client import push_to_gateway

        try:
            push_to_gateway(gateway, job="fedsgcg", registry=self._registry, timeout=PUSH_S)
            self.problems.pop("pushgateway", None)
        except (OSError, ValueError) as error:
            self.problems["pushgateway"] = f"{gateway}: {getattr(error, 'reason', None) or error}"

    def __enter__(self) -> Exporter:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class _Collector:
    """What prometheus-client registers: `describe` keeps it from collecting at registration."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    def describe(self) -> list[Family]:
        return []

    def collect(self) -> Iterator[Family]:
        return self._exporter.collect()


def _registry(exporter: Exporter) -> CollectorRegistry:
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector
    except ImportError as error:
        raise fail(
            "MON-901",
            found="no prometheus-client",
            expected="the extra `monitoring`",
            action="pip install 'fedsgcg[monitoring]'",
        ) from error
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Collector(exporter))
    return registry


class _Server(ThreadingMixIn, WSGIServer):
    """A server with a bound on its threads and on the time of each."""

    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        self.free = threading.BoundedSemaphore(MOST_REQUESTS)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a scraper that goes away is no event."""


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def _listen(targets: Targets, registry: CollectorRegistry) -> WSGIServer:
    from prometheus_client import make_wsgi_app

    server = _ServerV6 if ":" in targets.address else _Server
    try:
        return make_server(
            targets.address,
            targets.port or 0,
            make_wsgi_app(registry),
            server_class=server,
            handler_class=_Handler,
        )
    except (OSError, OverflowError) as error:
        raise fail(
            "MON-902",
            where=f"{targets.address}:{targets.port}",
            found=getattr(error, "strerror", None) or str(error),
            expected="a free port and an address of this machine",
            action="choose another port, or 0 for any free one",
        ) from error
