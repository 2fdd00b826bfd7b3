"""Files that are either complete or not there.

Every file that another process may read, or that must survive a killed process, is written under a
temporary name in its folder and then renamed. The coordinator's run folder uses `common.files.disk`
instead, which also waits for the medium.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path, *, ending: str = ".partial", mode: int | None = None) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` at the end of the block.

    After an error the temporary file is removed and `path` is what it was. The folder is created.

    Args:
        path: The file to write.
        ending: Ending of the temporary name, for libraries that choose a format by it.
        mode: Permissions of the file from its creation, e.g. 0o600 for a secret; by default those
            of the process.

    Raises:
        OSError: The file cannot be written; callers turn it into the error of their area.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of threads and processes keep writers of the same file apart; the last one wins.
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}{ending}")
    try:
        if mode is not None:
            temporary.unlink(missing_ok=True)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write a whole file as `replaced` does."""
    with replaced(path, mode=mode) as temporary:
        temporary.write_bytes(content)
