"""A book that cannot be changed unnoticed: one JSON line per entry, in a hash chain.

Each line contains its number (`seq`), the hash of the line before it (`previous`) and its own
(`hash`). Changing, removing or swapping a line breaks the chain. Cutting off the last lines or
writing the whole book anew does not: for that, its last hash is signed or kept elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.files.system import lock

START: Final = "0" * 64
"""`previous` of the first line."""

Entry = dict[str, Any]


class BrokenChainError(Exception):
    """A line does not fit the chain.

    Args:
        seq: Number of the first line that does not fit.
    """

    def __init__(self, seq: int) -> None:
        super().__init__(f"line {seq} does not match the hash chain")
        self.seq = seq


@dataclass(frozen=True)
class _Known:
    """What this process has verified of a book: its size in bytes, its lines, and the last two."""

    size: int
    count: int
    last: tuple[Entry, ...]


_VERIFIED: dict[Path, _Known] = {}


class Book:
    """An open book, locked for this process.

    Attributes:
        count: Number of lines.
        last: The last two lines, fewer in a shorter book.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path, self._file = path.resolve(), file
        known = _verified_tail(self._path, file)
        self.count, self.last = known.count, known.last
        self._remember(known.size)

    def append(self, content: Mapping[str, Any]) -> Entry:
        """Append a line and wait until it is on the disk; returns the whole line.

        Raises:
            OSError: It cannot be written; the book is unchanged.
        """
        previous = str(self.last[-1]["hash"]) if self.last else START
        entry = {"seq": self.count, **content, "previous": previous}
        entry["hash"] = seal(entry)
        size = _write(self._file, json.dumps(entry) + "\n")
        self.count += 1
        self.last = (*self.last[-1:], entry)
        self._remember(size)
        return entry

    def _remember(self, size: int) -> None:
        _VERIFIED[self._path] = _Known(size, self.count, self.last)


@contextmanager
def open_book(path: Path, action: str) -> Iterator[Book]:
    """Open a book for appending, made with its folder if missing.

    A process verifies the whole chain when it opens a book for the first time, and afterwards its
    length and its last line. An incomplete last line is the result of a crash and is dropped.

    Args:
        path: The book.
        action: What to do on a file system without locks.

    Raises:
        BrokenChainError: A line does not fit.
        FedsgcgError: CFG-008 for a file system without locks.
        OSError: It cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered, so that closing the file does not retry a write that a full disk refused.
    with path.open("a+b", buffering=0) as file:
        lock(file, wait=True, action=action)
        yield Book(path, file)


def _verified_tail(path: Path, file: FileIO) -> _Known:
    known = _VERIFIED.pop(path, None)
    if known is not None and known.last and file.seek(0, os.SEEK_END) == known.size:
        line = (json.dumps(known.last[-1]) + "\n").encode()
        file.seek(known.size - len(line))
        if file.read() == line:
            return known
    file.seek(0)
    content = file.readall()
    complete = content.rfind(b"\n") + 1
    entries = _entries(content[:complete])
    if complete < len(content):
        file.truncate(complete)
    return _Known(complete, len(entries), tuple(entries[-2:]))


def read_book(path: Path) -> list[Entry]:
    """Return every line of a book; raises BrokenChainError or OSError."""
    return _entries(path.read_bytes())


def seal(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a line's content, which includes the previous line's hash."""
    content = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _entries(content: bytes) -> list[Entry]:
    previous, found = START, []
    for seq, line in enumerate(content.splitlines()):
        try:
            entry = json.loads(line)
            intact = entry["hash"] == seal(entry)
            intact = intact and entry["seq"] == seq and entry["previous"] == previous
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise BrokenChainError(seq)
        previous = str(entry["hash"])
        found.append(dict(entry))
    return found


def _write(file: FileIO, line: str) -> int:
    """Write a line durably and return the size of the file."""
    end, data = file.seek(0, os.SEEK_END), line.encode()
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)  # remove a partial line, so that the next one can be appended
        raise
    return end + len(data)
