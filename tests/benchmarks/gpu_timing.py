"""Device and sizes of the GPU benchmarks, and times of calls with device synchronisation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedsgcg.clients.device import choose_device, describe_hardware
from tests.benchmarks.harness import ratio

Times = dict[str, list[float]]
Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmarks.

    Attributes:
        pixels: Pixels of a call of a kernel.
        batch: Slices of a batch.
        side: Side of a slice in pixels.
        width: Channels of the U-Net's first block.
        steps: Steps of a loop.
        repeats: Measurements of each variant.
        inner: Calls in a measurement of a kernel or step.
        slices: Slices in the file that the loop reads.
        volumes: Volumes of the evaluation.
        depth: Slices of a volume.
    """

    pixels: int = 1 << 19
    batch: int = 8
    side: int = 256
    width: int = 16
    steps: int = 60
    repeats: int = 5
    inner: int = 10
    slices: int = 256
    volumes: int = 50
    depth: int = 16


TOY = Sizes(
    *(600, 2, 32, 4),  # pixels, batch, side, width
    *(3, 2, 1),  # steps, repeats, inner
    *(6, 3, 4),  # slices, volumes, depth
)
"""Sizes with which every part runs in seconds on a CPU, before anyone pays for a GPU."""


def gpu(toy: bool) -> tuple[torch.device, Sizes]:
    """Return the first CUDA device and the full sizes, or with `toy` the CPU and small ones.

    Raises:
        SystemExit: Without a CUDA device that PyTorch can use.
    """
    if toy:
        return torch.device("cpu"), TOY
    if not torch.cuda.is_available():
        raise SystemExit(
            "the gpu parts need a CUDA device that PyTorch can use (--toy for small sizes on a "
            f"CPU); found {describe_hardware()}"
        )
    return choose_device("cuda"), Sizes()


def timed(variants: dict[str, Work], device: torch.device, sizes: Sizes) -> Times:
    """Return the milliseconds of a call with device synchronisation; the variants alternate."""
    times: Times = {name: [] for name in variants}
    for work in variants.values():
        for _ in range(min(5, sizes.inner)):
            work()
    for _ in range(sizes.repeats):
        for name, work in variants.items():
            with Clock(device) as clock:
                for _ in range(sizes.inner):
                    work()
            times[name].append(clock.milliseconds / sizes.inner)
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
