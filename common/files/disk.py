"""Durable files of the coordinator, written atomically.

All writes go through the few operations of `Disk`, so that a test can make the n-th of them fail or
write only a part, and check that the run still resumes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsgcg.common.errors import fail


class Disk:
    """File operations, each of which may fail; other modules call `write` and `discard`."""

    def make_folder(self, folder: Path) -> None:
        """Create a folder with its parents, unless it exists."""
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, path: Path, data: bytes) -> None:
        """Write bytes to a file and wait until they are on the medium."""
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        """Give a file its final name; readers see the old file or the new one, never a mixture."""
        source.replace(target)

    def settle(self, folder: Path) -> None:
        """Wait until the entries of a folder are on the medium."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Remove a file if it exists."""
        path.unlink(missing_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Replace the content of `path` atomically.

        Raises:
            FedsgcgError: SRV-401 if the disk refuses; the old content of `path` is then untouched.
        """
        temporary = path.with_name(f".{path.name}.tmp")
        with refusals(path):
            try:
                self.put(temporary, data)
                self.replace(temporary, path)
            except OSError:
                # Report the first failure; a leftover file is removed at the next start.
                with suppress(OSError):
                    self.remove(temporary)
                raise
            self.settle(path.parent)

    def discard(self, path: Path) -> None:
        """Remove a file; raises SRV-401 if the disk refuses."""
        with refusals(path):
            self.remove(path)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn an `OSError` (disk full, read-only, ...) into SRV-401 with the path and the reason."""
    try:
        yield
    except OSError as error:
        raise fail(
            "SRV-401",
            where=str(path),
            found=error.strerror or repr(error),
            expected="a writable folder with free space",
            action=(
                "free space or repair the folder, then start again: "
                "the run resumes after the last finished round"
            ),
        ) from error
