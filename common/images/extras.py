"""Imports the libraries of the extra `formats` when a file needs them, and opens files for them."""

from __future__ import annotations

import io
import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.errors import fail

INSTALL: Final = 'pip install "fedsgcg[formats]"'


def library(name: str, form: str) -> Any:
    """Return a library of the extra `formats`.

    Args:
        name: Name of the module, for example `SimpleITK`.
        form: The format that needs it, for the error.

    Raises:
        FedsgcgError: DAT-160 when it is not installed.
    """
    logging.getLogger(name).setLevel(logging.CRITICAL)  # its warnings quote headers, names included
    try:
        return import_module(name)
    except ImportError as error:
        raise fail(
            "DAT-160",
            found=f"{form}, and no {name.partition('.')[0]} ({error})",
            expected="the extra `formats`",
            action=f"Install it in the environment of fedsgcg: {INSTALL}",
        ) from error


class Clamped(io.BufferedReader):
    """A file that is never asked for more bytes than it has.

    A damaged length in a header may state four gigabytes, for which Python would allocate memory
    before it reads.
    """

    def __init__(self, path: Path) -> None:
        raw = io.FileIO(path)
        super().__init__(raw)
        self._bytes = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes, or what is left of the file."""
        left = max(0, self._bytes - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))
