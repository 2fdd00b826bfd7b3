"""Reads batches ahead in a thread and copies them to a GPU during the computation.

The slice cache is memory-mapped, so reading it means page faults and copies, for which the training
loop need not wait. On a CPU batches are passed through unchanged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

AHEAD: Final = 3
"""Number of batches that are read ahead."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(batches: Iterable[tuple[Any, ...]], device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Yield the batches in order with their tensors on the device.

    On a GPU the batches are produced and copied in a separate thread, so nothing else may use the
    random generators they use. An error in the production of a batch is raised when that batch is
    requested. Abandoning the iterator ends the thread after the batches in progress.

    Args:
        batches: Tuples of CPU tensors; other items are passed through.
        device: Target device.

    Yields:
        The tuples, on a GPU ready for the current stream without synchronising the host.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], torch.cuda.Event]:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            sent = tuple(
                upload(part, device) if isinstance(part, Tensor) else part for part in batch
            )
            return sent, stream.record_event()

    for sent, event in read_ahead(batches, send, AHEAD):
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for part in sent:
            if isinstance(part, Tensor):
                part.record_stream(current)
        yield sent


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for work queued there.

    A plain `.to(device)` waits for everything queued before it. Torch's allocator keeps the pinned
    copy until the device has read it, and then reuses its memory.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read_ahead(items: Iterable[Item], make: Callable[[Item], Made], ahead: int) -> Iterator[Made]:
    """Yield `make(item)` in order, computed up to `ahead` items ahead in one thread.

    Args:
        items: Consumed only by the thread.
        make: Called in the thread.
        ahead: Number of items in progress or waiting, at least one.
    """
    source = iter(items)

    def take() -> tuple[Made] | None:
        for item in source:
            return (make(item),)
        return None

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: deque[Future[tuple[Made] | None]] = deque(
            pool.submit(take) for _ in range(max(1, ahead))
        )
        try:
            while (made := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(take))
                yield made[0]
        finally:
            for future in waiting:
                future.cancel()
