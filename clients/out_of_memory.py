"""When the memory does not hold a training step: how that is noticed, and what is let go before the next try."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Final, TypeVar

import torch

T = TypeVar("T")

SIGNS: Final = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
"""Words of the RuntimeErrors that torch's CPU allocator, the CUDA driver, cuBLAS and cuDNN raise for want of memory."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the host.

    Torch has a class of its own for CUDA's allocator only. An error that another one followed, as when the capture of a
    graph is cut off, counts too.
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
    """Return what the work returns, None when the memory does not hold it; every other error goes on its way.

    The error ends here because it keeps the frames of the work, and they their tensors.
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:  # torch's own OutOfMemoryError is a RuntimeError
        if out_of_memory(error):
            return None
        raise


def free_memory(device: torch.device) -> None:
    """Give back what an abandoned step still holds; to be called after its error is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
