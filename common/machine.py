"""What last bits depend on beside settings and seed: processor, vector width and build of torch.

A model's hash covers every bit of its values, and sums are added in another order by another processor, another build
of torch or another number of threads. Only where all of these are equal can equal hashes be expected.
"""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Return the model name of this machine's processor, its architecture where the system does not say."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return name
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name
    )


def arithmetic_of(threads: int) -> dict[str, str | int]:
    """Return what decides the last bits of a training in this process.

    Args:
        threads: CPU threads of a training process.

    Returns:
        `cpu` (model name), `capability` (vector instructions that torch uses), `torch` (version with its build),
        `threads`.
    """
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": processor(),
        "capability": capability,
        "torch": torch.__version__,
        "threads": threads,
    }
