"""Paired timing: all variants alternate in one process on one thread, by the process's CPU clock.

Ratios are computed per round, and their median is reported with its quartiles, so that other load
on the machine affects both sides equally. Milliseconds are only a rough guide.

Every variant runs twice in a row and the second run counts: it finds caches and allocator in the
state of a training loop. The allocator is not changed: a variant with large temporary arrays pays
for their page faults (0.1 to 0.7 ms/MiB) every time, because glibc returns blocks above 32 MiB to
the system.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Work = Callable[[], object]


@contextmanager
def one_thread():
    """Use one thread of torch, as the ratios of CPU times assume."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def paired(variants: Mapping[str, Work], rounds: int = 7) -> dict[str, list[float]]:
    """Run every variant twice per round and return CPU milliseconds of the second run."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, work in variants.items():
                work()
                start = time.process_time()
                work()
                times[name].append(1e3 * (time.process_time() - start))
    finally:
        gc.enable()
    return times


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """Return median, lower and upper quartile of the ratio slow / fast per round."""
    ratios = sorted(a / max(b, 1e-6) for a, b in zip(times[slow], times[fast], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def extra_memory(work: Work) -> float:
    """Return the increase of resident memory in MiB while `work` runs once; NaN without /proc.

    Freed memory is returned to the system first, because a page that is already resident would not
    be counted.
    """
    status = Path("/proc/self/statm")
    if not status.exists():
        return float("nan")
    work()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    page = 4096 / 2**20
    peak = before = int(status.read_text().split()[1])
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, int(status.read_text().split()[1]))
            time.sleep(2e-4)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join()
    return (peak - before) * page


def row(
    part: str,
    case: str,
    measure: str,
    value: float | tuple[float, float, float],
    unit: str,
    target: str = "",
    met: bool | None = None,
) -> dict[str, Any]:
    """Return a row of the table: part, case, measure, median with quartiles, and target."""
    middle, low, high = value if isinstance(value, tuple) else (value, value, value)
    verdict = "yes" if met else "no"
    return {
        "part": part,
        "case": case,
        "measure": measure,
        "value": float(middle),
        "low": float(low),
        "high": float(high),
        "unit": unit,
        "target": target,
        "met": "" if met is None else verdict,
    }


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the rows as a table and return them."""
    table = Table("part", "case", "measure", "value", "quartiles", "target", "met")
    for line in rows:
        spread = f"{line['low']:.3g} to {line['high']:.3g}" if line["low"] != line["high"] else ""
        table.add_row(
            line["part"],
            line["case"],
            line["measure"],
            f"{line['value']:.3g} {line['unit']}",
            spread,
            line["target"],
            line["met"],
        )
    Console(width=160).print(table)
    return rows


def at_least(value: tuple[float, float, float], target: float) -> bool:
    """Whether the median reaches the target."""
    return value[0] >= target
