"""Serves the metrics of run folders: of a running study, of a kit, or of any folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import fail
from fedsgcg.common.files.system import expand
from fedsgcg.common.settings.run import TelemetrySettings

POLL_S = 1.0


@contextmanager
def served_metrics(folder: Path, settings: TelemetrySettings, console: Screen) -> Iterator[None]:
    """Serve the metrics of a study while the block runs, if its settings ask for it.

    Raises:
        FedsgcgError: MON-901 without the extra, MON-902 for a port that cannot be used; both before
            the block starts.
    """
    if not settings.is_on:
        yield
        return
    from fedsgcg.server.telemetry.exporter import Exporter, Targets

    targets = Targets(
        port=settings.port or None,
        address=settings.address,
        textfile=expand(settings.textfile, "telemetry.textfile") if settings.textfile else None,
        pushgateway=settings.pushgateway,
    )
    with Exporter(folder, targets) as exporter:
        if exporter.url:
            console.print(f"metrics: {exporter.url}")
        yield
    for problem in exporter.problems.values():
        console.print(f"metrics were not written: {problem}", style="yellow")


def serve_folder(
    folder: Path,
    console: Screen,
    *,
    port: int | None,
    address: str,
    textfile: Path | None,
    pushgateway: str,
    once: bool,
) -> int:
    """Serve the metrics of a folder until the process is stopped, or write them once.

    Returns:
        The exit code: 1 if a text file or a push gateway refused the last metrics, else 0.

    Raises:
        FedsgcgError: CFG-001 without a folder, or `once` without a text file or push gateway;
            MON-901 without the extra, MON-902 for a port that cannot be used.
    """
    from fedsgcg.server.telemetry.exporter import Exporter, Targets

    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise fail("CFG-001", where=str(folder), found=found, expected="a folder with runs")
    if once and textfile is None and not pushgateway:
        expected = "--textfile or --pushgateway"
        raise fail("CFG-001", where="--once", found="neither", expected=expected)
    exporter = Exporter(folder, Targets(None if once else port, address, textfile, pushgateway))
    if once:
        exporter.poll()
        return _report(exporter.problems, {}, console)
    shown: dict[str, str] = {}
    with exporter:
        console.print(f"metrics of {folder}: {exporter.url}")
        console.event("metrics.served", url=exporter.url, folder=folder)
        while True:
            _report(exporter.problems, shown, console)
            threading.Event().wait(POLL_S)


def _report(problems: dict[str, str], shown: dict[str, str], console: Screen) -> int:
    """Print what is new among the problems; return 1 if there are any."""
    for target, problem in list(problems.items()):
        if shown.get(target) != problem:
            console.print(f"metrics were not written: {problem}", style="yellow")
    shown.clear()
    shown.update(problems)
    return 1 if problems else 0
