"""What to do when the file system refuses: a full disk, a long name and a missing right are three things."""

from __future__ import annotations

import errno
from typing import Final

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


def disk_advice(error: OSError, otherwise: str) -> str:
    """Return what the reader should do about an error of the file system.

    Args:
        error: The error.
        otherwise: The other way out, as it follows "Make room, or", e.g. "choose another DIR.".
    """
    if error.errno == errno.ENAMETOOLONG:
        return "Shorten the name: a file system takes 255 bytes a name (an umlaut has two) and 4095 a path."
    if error.errno in _FULL:
        return f"Make room, or {otherwise}"
    if error.errno in _DENIED:
        return f"Get the right to write there, or {otherwise}"
    return otherwise[:1].upper() + otherwise[1:]
