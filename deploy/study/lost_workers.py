"""A worker of the simulation that was lost: killed, out of memory, or with the machine it ran on.

Nothing is wrong with the cell: its rounds are on the disk, and the same call goes on from there. Ray raises an error of
one of these kinds at the coordinator; Flower's simulation engine only logs it and hands an error message to the round
loop, which ends the run for want of an answer (RND-402).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from common.errors import FedsgcgError, fail

LOST = "RND-410"


@cache
def reasons() -> tuple[tuple[type[BaseException], str], ...]:
    """Return Ray's errors of this kind with what happened; actors that died or are away are `RayActorError`."""
    from ray import (
        exceptions as ray,
    )  # late, for Ray reads the environment that `prepare_environment` makes

    return (
        (ray.OutOfMemoryError, "Ray ended it because the memory of the machine was nearly used up"),
        (ray.NodeDiedError, "the machine that it ran on was lost"),
        (ray.LocalRayletDiedError, "Ray's own process on this machine ended"),
        (ray.WorkerCrashedError, "its process was killed or crashed"),
        (ray.RayActorError, "its process was killed or crashed"),
        (ray.ObjectLostError, "the process or machine that held its data was lost"),
        (ray.RpcError, "its machine did not answer any more"),
    )


def lost_worker(error: BaseException | None) -> str:
    """Return why a worker was lost, from an error or what it came from; "" for an error of any other kind."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for kind, reason in reasons():
            if isinstance(error, kind):
                return reason + (
                    SHORT if "memory" in str(error).casefold() and "memory" not in reason else ""
                )
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return ""


SHORT = "; Ray names memory among the causes"
"""An actor that the memory monitor ended says so in its text alone."""


def as_lost(error: BaseException) -> FedsgcgError | None:
    """Return RND-410 for a lost worker, None for an error of any other kind."""
    if isinstance(error, FedsgcgError) and error.code == LOST:
        return error
    found = lost_worker(error)
    if not found:
        return None
    action = "call again: the cell goes on from its last done round; where memory is short, raise site.threads"
    return fail(
        LOST, found=found, action=f"{action}, so that fewer cells run at once, or free memory"
    )


@contextmanager
def told_of_lost_workers() -> Iterator[None]:
    """Raise RND-410 in place of what the round loop raised when Flower's engine had logged the loss of a worker."""
    heard = _Losses()
    logger = logging.getLogger("flwr")
    logger.addHandler(heard)
    try:
        yield
    except Exception as error:
        lost = as_lost(error) or (as_lost(heard.first) if heard.first is not None else None)
        if lost is None:
            raise
        raise lost from error
    finally:
        logger.removeHandler(heard)


class _Losses(logging.Handler):
    """Keeps the first error of a lost worker that is logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.first is None and isinstance(record.msg, BaseException) and lost_worker(record.msg):
            self.first = record.msg
