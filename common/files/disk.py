"""The coordinator's disk: every durable file is written whole, or not at all.

All writes go through the few operations of `Disk`, so that a test can let the n-th of them fail or be cut short and see
that a run still resumes (reliability.md, rows 35 and 36).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import fail


class Disk:
    """Operations on files. Each method is one operation that may fail; `write` and `discard` are what others call."""

    def make_folder(self, folder: Path) -> None:
        """Make a folder with its parents; one that is there is fine."""
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, path: Path, data: bytes) -> None:
        """Write bytes into a new file and wait until they are on the medium."""
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        """Give a file its final name; readers see the old file or the new one, never a mixture."""
        source.replace(target)

    def settle(self, folder: Path) -> None:
        """Wait until the names of a folder are on the medium."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        path.unlink(missing_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Replace the content of `path` in one step.

        Raises:
            FedsgcgError: SRV-401 when the disk refuses; what `path` held before is untouched.
        """
        temporary = path.with_name(f".{path.name}.tmp")
        with refusals(path):
            try:
                self.put(temporary, data)
                self.replace(temporary, path)
            except OSError:
                with suppress(
                    OSError
                ):  # the first failure is the one to tell; a leftover is cleared at the next start
                    self.remove(temporary)
                raise
            self.settle(path.parent)

    def discard(self, path: Path) -> None:
        """Remove a file; raises SRV-401 when the disk refuses."""
        with refusals(path):
            self.remove(path)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn an `OSError` (disk full, read-only, file too large …) into SRV-401 with the path and the reason."""
    try:
        yield
    except OSError as error:
        raise fail(
            "SRV-401",
            where=str(path),
            found=error.strerror or repr(error),
            expected="a folder with room that can be written",
            action="free space or mend the folder, then start again: the run goes on from the last done round",
        ) from error
