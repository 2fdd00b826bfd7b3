"""Detects the loss of a simulation worker: killed, out of memory, or with its machine.

The cell itself is fine: its rounds are on disk, and the same call resumes it. Ray raises one of
several errors at the coordinator. Flower's simulation engine only logs it and passes an error
message to the round loop, which ends the run because an answer is missing (RND-402).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from fedsgcg.common.errors import FedsgcgError, fail

LOST = "RND-410"


@cache
def reasons() -> tuple[tuple[type[BaseException], str], ...]:
    """Return Ray's errors for a lost worker, and what happened for each of them.

    Actors that died or cannot be reached are `RayActorError`. A machine without Ray has none.
    """
    # Imported late, because Ray reads the environment that `prepare_environment` sets.
    try:
        from ray import exceptions as ray
    except ModuleNotFoundError:
        return ()

    return (
        (ray.OutOfMemoryError, "Ray ended it because the machine was nearly out of memory"),
        (ray.NodeDiedError, "the machine on which it ran was lost"),
        (ray.LocalRayletDiedError, "Ray's own process on this machine ended"),
        (ray.WorkerCrashedError, "its process was killed or crashed"),
        (ray.RayActorError, "its process was killed or crashed"),
        (ray.ObjectLostError, "the process or machine that held its data was lost"),
        (ray.RpcError, "its machine no longer answered"),
    )


def lost_worker(error: BaseException | None) -> str:
    """Return why a worker was lost, from an error or its causes; "" for any other error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for kind, reason in reasons():
            if isinstance(error, kind):
                if "memory" in str(error).casefold() and "memory" not in reason:
                    return reason + MEMORY_HINT
                return reason
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return ""


MEMORY_HINT = "; Ray names memory among the causes"
"""Added when only the error's text says that Ray's memory monitor ended an actor."""


def as_lost(error: BaseException) -> FedsgcgError | None:
    """Return RND-410 for a lost worker, None for any other error."""
    if isinstance(error, FedsgcgError) and error.code == LOST:
        return error
    found = lost_worker(error)
    if not found:
        return None
    action = (
        "call again: the cell resumes after its last completed round. If memory is short, free "
        "some, or raise site.threads, so that fewer cells run at once"
    )
    return fail(LOST, found=found, action=action)


@contextmanager
def raise_lost_workers() -> Iterator[None]:
    """Raise RND-410 instead of the round loop's error if Flower logged the loss of a worker."""
    losses = _Losses()
    logger = logging.getLogger("flwr")
    logger.addHandler(losses)
    try:
        yield
    except Exception as error:
        lost = as_lost(error)
        if lost is None and losses.first is not None:
            lost = as_lost(losses.first)
        if lost is None:
            raise
        raise lost from error
    finally:
        logger.removeHandler(losses)


class _Losses(logging.Handler):
    """Keeps the first logged error of a lost worker."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.first is None and isinstance(record.msg, BaseException) and lost_worker(record.msg):
            self.first = record.msg
