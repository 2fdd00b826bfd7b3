"""The parts of a machine that decide the last bits of a result: processor, torch build, threads.

A model's hash covers every bit of its weights. The order of sums depends on the processor, the
build of torch and the number of threads, so equal hashes can be expected only if all three agree.
"""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Return the model name of the processor, or its architecture if the name is unknown."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return name
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else name


def arithmetic_of(threads: int) -> dict[str, str | int]:
    """Return what decides the last bits of training in this process.

    Args:
        threads: CPU threads of a training process.

    Returns:
        `cpu` (model name), `capability` (vector instructions used by torch), `torch` (version and
        build), `threads`.
    """
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": processor(),
        "capability": capability,
        "torch": torch.__version__,
        "threads": threads,
    }
