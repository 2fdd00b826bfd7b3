"""Batches on their way to a GPU: read ahead in a thread, through pinned memory, copied beside the computation.

The cache of slices is memory-mapped: reading it is a page fault or a copy, which the training loop need not wait for.
On a CPU nothing is gained and nothing is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

AHEAD: Final = 3
"""Batches that are read before they are asked for."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(batches: Iterable[tuple[Any, ...]], device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Yield the same batches in the same order with their tensors on the device.

    On a GPU the batches are made and sent by a thread of their own, so nothing else may draw from what they draw from.
    An error while a batch is made comes up where that batch would have come. Abandoning the iterator ends the thread
    once the batches it has begun are done.

    Args:
        batches: Tuples of CPU tensors; what is no tensor is handed on as it is.
        device: Where to put them.

    Yields:
        The tuples; on a GPU ready for the stream that is current at that moment, without a wait of the host.
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
    """Send a CPU tensor to the device without making the host wait for what the device still has to do.

    A plain `.to(device)` waits for everything that was queued before it. The pinned copy is kept by torch's allocator
    until the device has read it, and its memory is used again afterwards.
    """
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def read_ahead(items: Iterable[Item], make: Callable[[Item], Made], ahead: int) -> Iterator[Made]:
    """Yield `make(item)` in order; one thread takes the items, up to `ahead` of them before they are asked for.

    Args:
        items: Taken by the thread alone.
        make: Called in the thread.
        ahead: Items in work or waiting, at least one.
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
