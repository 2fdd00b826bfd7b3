"""Device and precision of a site; an unavailable device is an error, never silently replaced."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fedsgcg.common.errors import fail
from fedsgcg.common.settings.plan import MethodSettings

_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(device: str, threads: int = 1) -> torch.device:
    """Choose the device; set the thread count and deterministic algorithms, which fix rounding.

    Args:
        device: `auto` (a GPU if one is available), `cpu` or `cuda`.
        threads: CPU threads of this process.

    Raises:
        FedsgcgError: CFG-004 when `cuda` is requested and unavailable.
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
    # On a CPU the same seed must give the same hash; on a GPU the deterministic kernels of bilinear
    # upsampling cost too much, and reproducibility is stated only up to a tolerance ("Reproducible"
    # in docs/explanation/protocol.md). `torch.use_deterministic_algorithms` does the same but
    # imports torch's compiler, which takes three seconds.
    torch.set_deterministic_debug_mode("error" if chosen.type == "cpu" else "default")
    # Batch shapes repeat thousands of times, so searching for the fastest convolution pays off.
    torch.backends.cudnn.benchmark = chosen.type == "cuda"
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return chosen


def precision(settings: MethodSettings, device: torch.device) -> torch.dtype:
    """Return the network's compute type: bf16 on a GPU with bf16 hardware, float32 elsewhere.

    A CPU never uses bf16: without special instructions it is about a hundred times slower there.

    Raises:
        FedsgcgError: CFG-004 when `bf16` is requested and the device does not support it.
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
    """Return the network's autocast context, disabled for float32."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def describe_hardware() -> str:
    """Describe torch's build, the NVIDIA driver and the visible GPUs in one line."""
    driver = _DRIVER.read_text().splitlines()[0].strip() if _DRIVER.exists() else "no NVIDIA driver"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    build = f"torch {torch.__version__} built for CUDA {torch.version.cuda or 'none'}"
    devices = f"{torch.cuda.device_count()} device(s)"
    return f"{build}; {driver}; {devices}; CUDA_VISIBLE_DEVICES {visible!r}"
