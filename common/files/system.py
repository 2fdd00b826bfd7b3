"""File locks, home directory and user name, any of which a machine may lack."""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
from pathlib import Path
from typing import IO, Any, Final

from fedsgcg.common.errors import fail

NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
"""Errors of a file system without `flock`: Lustre without `-o flock`, NFS without a lock daemon."""


def lock(file: IO[Any], *, action: str, wait: bool = False, shared: bool = False) -> bool:
    """Take the lock of an open file, which is held until the file is closed.

    Args:
        file: The file; its `name` is shown in an error.
        action: What to do if the file system has no locks.
        wait: Wait until the lock is free.
        shared: Any number of processes may hold it shared, but then none exclusively.

    Returns:
        Whether the lock is held now; False if another process (or open file) holds it.

    Raises:
        FedsgcgError: CFG-008 if the file system has no locks.
        OSError: Any other failure of the file system.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        found = f"{error.strerror or error} (a network file system without locks?)"
        raise fail(
            "CFG-008", where=str(file.name), found=found, expected="flock", action=action
        ) from error
    return True


def expand(path: str, setting: str) -> Path:
    """Return a path with `~` or `~user` replaced by the home directory.

    Args:
        path: The path as it was given.
        setting: The setting to change to a full path if there is no home directory.

    Raises:
        FedsgcgError: CFG-009 without a home directory, as in a container with an undeclared user.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, KeyError) as error:
        found = f"{path} for user {os.getuid()}, HOME is {os.environ.get('HOME') or 'not set'}"
        action = f"Set {setting} to a full path, or HOME to a writable folder."
        raise fail("CFG-009", found=found, expected="a home directory", action=action) from error


def has_home() -> bool:
    """Whether this user has a home directory."""
    try:
        Path.home()
    except (RuntimeError, KeyError):
        return False
    return True


def user_name() -> str:
    """Return the name of the user, or `uid N` if this machine has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"
