"""Where a site computes and in which precision: what is asked for and absent is refused, never replaced in silence."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from common.errors import fail
from common.settings.plan import MethodSettings

_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(device: str, threads: int = 1) -> torch.device:
    """Choose the device and fix what the order of sums depends on: thread count and deterministic algorithms.

    Args:
        device: `auto` (a GPU where one is visible), `cpu` or `cuda`.
        threads: CPU threads of this process.

    Raises:
        FedsgcgError: CFG-004 when `cuda` is asked for and absent, with what was found.
    """
    torch.set_num_threads(threads)
    usable = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not usable:
        raise fail(
            "CFG-004",
            found=describe_hardware(),
            expected="a CUDA device that PyTorch can use",
            action="install the driver and a CUDA build of torch, or set device=cpu or device=auto",
        )
    chosen = torch.device("cuda" if usable else "cpu")
    # On a CPU the same seed must give the same hash; on a GPU the deterministic kernels of bilinear upsampling cost
    # too much, and reproducibility has a stated tolerance there (reliability.md I7).
    # `torch.use_deterministic_algorithms` says the same, but imports torch's compiler: three seconds of a process that
    # does not train.
    torch.set_deterministic_debug_mode("error" if chosen.type == "cpu" else "default")
    # Batches of one shape come thousands of times: the first may try which convolution is fastest.
    torch.backends.cudnn.benchmark = chosen.type == "cuda"
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return chosen


def precision(settings: MethodSettings, device: torch.device) -> torch.dtype:
    """Return the type of the network's arithmetic: bf16 on a GPU whose hardware has it, float32 elsewhere.

    A CPU never gets bf16: without special instructions it is a hundred times slower there (performance.md 6).

    Raises:
        FedsgcgError: CFG-004 when `bf16` is asked for and the device does not have it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.precision == "bf16" and not has_bf16:
        raise fail(
            "CFG-004",
            where="method.precision",
            found=f"device {device.type} without bf16 hardware; {describe_hardware()}",
            expected="a CUDA device with bf16 arithmetic",
            action="set method.precision=auto or float32",
        )
    return torch.bfloat16 if has_bf16 and settings.precision != "float32" else torch.float32


def autocast_for(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return the context in which the network runs: autocast to `dtype`, or nothing for float32."""
    return torch.autocast(
        device.type, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32
    )


def describe_hardware() -> str:
    """Say in one line what there is: torch's build, the driver, and what the environment shows of the GPUs."""
    driver = _DRIVER.read_text().splitlines()[0].strip() if _DRIVER.exists() else "no NVIDIA driver"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    build = f"torch {torch.__version__} built for CUDA {torch.version.cuda or 'none'}"
    return f"{build}; {driver}; {torch.cuda.device_count()} device(s); CUDA_VISIBLE_DEVICES {visible!r}"
