"""Opens a DICOM file so that a damaged length cannot claim memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Map a file into memory for pydicom.

    pydicom reads as many bytes as an element states, up to 4 GiB. A file object allocates them
    before it reads; a mapping returns what the file has.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
            yield BytesIO()
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            yield cast(BinaryIO, mapping)
