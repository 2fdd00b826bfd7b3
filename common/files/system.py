"""What a machine may lack: file locks on a network file system, a home directory, a name of the user."""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
from pathlib import Path
from typing import IO, Any, Final

from common.errors import fail

NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
"""How a file system says that it offers no `flock`: Lustre mounted without `-o flock`, NFS without a lock daemon."""


def lock(file: IO[Any], *, action: str, wait: bool = False) -> bool:
    """Take the exclusive lock of an open file, which is held until the file is closed.

    Args:
        file: The file; its `name` is shown in an error.
        action: Which folder to choose where the file system offers no locks.
        wait: Wait for the one who holds it.

    Returns:
        Whether the lock is held now; False when another process (or open file) holds it.

    Raises:
        FedsgcgError: CFG-008 where the file system offers no locks.
        OSError: For any other failure of the file system.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    """Return a path with the home directory put in for `~` or `~user`.

    Args:
        path: As it was written.
        setting: What to set to a full path where there is no home directory.

    Raises:
        FedsgcgError: CFG-009 without a home directory, as in a container whose user nobody declared.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, KeyError) as error:
        found = f"{path} for user {os.getuid()}, HOME is {os.environ.get('HOME') or 'not set'}"
        action = f"Set {setting} to a full path, or HOME to a folder that can be written."
        raise fail("CFG-009", found=found, expected="a home directory", action=action) from error


def has_home() -> bool:
    """Whether this user has a home directory at all."""
    try:
        Path.home()
    except (RuntimeError, KeyError):
        return False
    return True


def user_name() -> str:
    """Return the name of the user, or `uid N` for one without a name on this machine."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"
