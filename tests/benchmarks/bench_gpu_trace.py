"""Where the time of a captured training step goes on a GPU: its kernels by their share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.bench_gpu_step import Loop, plan_of
from tests.benchmarks.gpu_timing import Sizes, gpu
from tests.benchmarks.harness import row, show

KERNELS = 12
"""Kernels in the table; the rest is one line."""


def run(*, toy: bool = False) -> list[dict[str, Any]]:
    """Trace on the first CUDA device, or with `toy` on the CPU, and return the rows."""
    return show(trace(*gpu(toy)))


def trace(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Return the shares of the largest kernels in the device time of warm RAM + SgCG steps."""
    shape = (sizes.slices, 3, sizes.side, sizes.side)
    slices = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    loop = Loop(plan_of("ram_sgcg", sizes), device, sizes, slices, eager=False)
    loop.once()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        loop.once()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = sorted(
        ((float(getattr(event, name)), event.key) for event in found.key_averages()), reverse=True
    )
    total = sum(time for time, _ in times) or float("nan")
    part, case = "trace, GPU", f"RAM+SgCG, B={sizes.batch}, {sizes.side} x {sizes.side}"
    rows = [
        row(part, case, kernel[:60], time / total, "of the step")
        for time, kernel in times[:KERNELS]
    ]
    rest = sum(time for time, _ in times[KERNELS:]) / total
    left = f"the other {max(0, len(times) - KERNELS)} kernels"
    return [
        row(part, case, "all kernels of a step", total / 1e3 / sizes.steps, "ms"),
        *rows,
        row(part, case, left, rest, "of the step"),
    ]
