"""Detects out-of-memory errors and frees memory for a retry."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Final, TypeVar

import torch

T = TypeVar("T")

SIGNS: Final = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
"""Out-of-memory messages of torch's CPU allocator, the CUDA driver, cuBLAS and cuDNN."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or on the host.

    Torch has a dedicated class for CUDA's allocator only. An out-of-memory error that caused
    another error counts as well, as when it interrupts the capture of a graph.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    before = error.__cause__ or error.__context__
    return any(sign in str(error) for sign in SIGNS) or (
        before is not None and out_of_memory(before)
    )


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """Return the result of `work`, or None if memory runs out; other errors propagate.

    The error is not passed on, because its frames would keep their tensors alive.
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:  # torch's own OutOfMemoryError is a RuntimeError
        if out_of_memory(error):
            return None
        raise


def free_memory(device: torch.device) -> None:
    """Free what an abandoned step still holds; call it after the error has been discarded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
