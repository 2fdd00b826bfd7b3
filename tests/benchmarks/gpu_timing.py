"""Sizes of the GPU benchmark, and times of calls with device synchronisation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.benchmarks.harness import ratio

Times = dict[str, list[float]]
Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """Pixels of a kernel, slices and side of a batch, steps, repeats, volumes and their depth."""

    pixels: int = 1 << 19
    batch: int = 8
    side: int = 256
    steps: int = 60
    repeats: int = 5
    slices: int = 256
    volumes: int = 50
    depth: int = 16


def timed(variants: dict[str, Work], device: torch.device, repeats: int, inner: int = 10) -> Times:
    """Return the milliseconds of a call with device synchronisation; the variants alternate."""
    times: Times = {name: [] for name in variants}
    for work in variants.values():
        for _ in range(5):
            work()
    for _ in range(repeats):
        for name, work in variants.items():
            with Clock(device) as clock:
                for _ in range(inner):
                    work()
            times[name].append(clock.milliseconds / inner)
    return times


class Clock:
    """Milliseconds of a block, which ends when the device has done its work."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.milliseconds = device, 0.0

    def __enter__(self) -> Clock:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.milliseconds = 1e3 * (time.perf_counter() - self._began)


def middle(times: Times, name: str) -> tuple[float, float, float]:
    """Return median and quartiles of a variant."""
    return ratio({name: times[name], "1": [1.0] * len(times[name])}, name, "1")
