"""Advice for errors of the file system, by their cause."""

from __future__ import annotations

import errno
from typing import Final

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_LOST: Final = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENOTCONN, errno.ECONNRESET, errno.EREMOTEIO),
    }
)
"""Errors of a disk or a network folder that fails; the file itself may be sound."""

_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_lost(error: BaseException) -> bool:
    """Whether a disk or a network folder failed, not the file."""
    return isinstance(error, OSError) and error.errno in _LOST


def disk_advice(error: OSError, otherwise: str) -> str:
    """Return what the reader should do about an error of the file system.

    Args:
        error: The error.
        otherwise: The alternative, to follow "Free space, or", e.g. "choose another DIR.".
    """
    if error.errno == errno.ENAMETOOLONG:
        return (
            "Shorten the name: file systems allow 255 bytes per name (an umlaut has two) "
            "and 4095 per path."
        )
    if error.errno in _FULL:
        return f"Free space, or {otherwise}"
    if error.errno in _DENIED:
        return f"Get write permission, or {otherwise}"
    return otherwise[:1].upper() + otherwise[1:]
