"""The cache folder of a site: its location, locking between processes, and content hashes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.files.errors import disk_advice
from fedsgcg.common.files.system import expand, lock

UNUSED_DAYS = 30.0
"""Days without use after which a slice file is removed.

Files are named after their content, so they accumulate as data and settings change.
"""


BEYOND: Final = "POL-707"
GIGA: Final = 1e9


@dataclass(frozen=True)
class Budget:
    """Disk and memory that a site may use to convert its images, in bytes.

    Attributes:
        cache_bytes: Size of the cache folder's slice files.
        memory_bytes: Memory for the conversion of one image.
    """

    cache_bytes: float = math.inf
    memory_bytes: float = math.inf

    def check_memory(self, needed: int, case: str) -> None:
        """Raise POL-707 when an image needs more memory than allowed."""
        if needed > self.memory_bytes:
            raise beyond("memory", "max_memory_gb", needed, self.memory_bytes, case)


UNLIMITED: Final = Budget()
"""Budget of a simulation, whose machine belongs to whoever starts it."""


def beyond(what: str, name: str, needed: float, most: float, where: str) -> FedsgcgError:
    """Return POL-707 for gigabytes beyond a limit of the site."""
    found = f"data.image_size needs {needed / GIGA:.1f} GB of {what}"
    expected = f"at most {most / GIGA:.1f} GB ({name} of site.yaml)"
    action = f"lower data.image_size, or have the site raise {name}"
    return fail(BEYOND, where=where, found=found, expected=expected, action=action)


def make_room(path: Path, size: int, budget: Budget) -> None:
    """Remove slice files that were not used for longest until `size` bytes of `path` fit.

    Raises:
        FedsgcgError: POL-707 when the file alone exceeds the budget, DAT-113 when a file cannot be
            removed.
    """
    if size > budget.cache_bytes:
        raise beyond("cache", "max_cache_gb", size, budget.cache_bytes, str(path.parent))
    if math.isinf(budget.cache_bytes):
        return
    others = cache_files(path.parent.parent)
    total = size + sum(others.values())
    for other in sorted(others, key=lambda one: one.stat().st_mtime):
        if total <= budget.cache_bytes:
            return
        try:
            other.unlink(missing_ok=True)
        except OSError as error:
            raise cache_error(error, other) from error
        total -= others[other]


def cache_folder(setting: str) -> Path:
    """Return the cache folder: the setting, $FEDSGCG_CACHE or ~/.cache/fedsgcg.

    Raises:
        FedsgcgError: CFG-009 without a home directory.
    """
    return expand(
        setting or os.environ.get("FEDSGCG_CACHE", "") or "~/.cache/fedsgcg",
        "site.cache or FEDSGCG_CACHE",
    )


def cache_error(error: OSError, path: Path) -> FedsgcgError:
    """Return DAT-113 for a file system error."""
    found = f"{type(error).__name__}: {error.strerror or error}"
    action = disk_advice(error, "set site.cache to a writable folder.")
    return fail(
        "DAT-113",
        found=found,
        expected="a writable folder with free space",
        action=action,
        where=str(path),
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; other processes of the machine wait for it.

    Raises:
        FedsgcgError: DAT-113 when the lock file cannot be created or locked, CFG-008 when the file
            system does not support locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        raise cache_error(error, path) from error
    with handle:
        try:
            lock(
                handle,
                wait=True,
                action="Set site.cache (or FEDSGCG_CACHE) to a folder on a local disk.",
            )
        except OSError as error:
            raise cache_error(error, path) from error
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        FedsgcgError: DAT-113 when it cannot be written.
    """
    try:
        write_file(path, content)
    except OSError as error:
        raise cache_error(error, path) from error


def digest(content: bytes, size: int) -> str:
    """Return a BLAKE2b digest of `size` bytes as hex."""
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def hash_memo(cache: Path, site: str) -> Path:
    """Return the file that stores the content hashes of a site's files."""
    return cache / "hashes" / f"{digest(site.encode(), 8)}.json"


def file_hashes(paths: Sequence[Path], memo: Path) -> dict[Path, str]:
    """Return the content hash of every file.

    A file whose size and modification time match the memo is not read again. A file that cannot be
    read gets the hash "unreadable"; the error is reported when the case is read, and a repaired
    file counts as changed.
    """
    known = _read_memo(memo)
    fresh = {str(path.absolute()): _entry(path, known.get(str(path.absolute()))) for path in paths}
    if any(known.get(name) != entry for name, entry in fresh.items()):
        write_atomically(memo, json.dumps({**known, **fresh}).encode())
    return {path: str(fresh[str(path.absolute())][2]) for path in paths}


def _entry(path: Path, known: list[Any] | None) -> list[Any]:
    """Return [size, modification time in ns, hash] of a file."""
    try:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if known and known[:2] == stamp and known[2] != "unreadable":
            return known
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return [*stamp, content.hexdigest()]
    except OSError:
        # The error is reported when the case is read; here the file must not look unchanged.
        return [0, 0, "unreadable"]


def _read_memo(path: Path) -> dict[str, list[Any]]:
    """Return the stored entries; a missing or damaged memo only means that files are read again."""
    try:
        memo = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = memo.items() if isinstance(memo, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 3}


def cache_files(cache: Path) -> dict[Path, int]:
    """Return every slice file of a cache folder with its size in bytes."""
    return {path: path.stat().st_size for path in sorted((cache / "slices").glob("*.arrow"))}


def touch_used(path: Path) -> None:
    """Update a slice file's time at most once a day, so that `prune` keeps it.

    Errors are ignored; the file then looks unused for longer.
    """
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > 86400:
            os.utime(path)


def prune(
    cache: Path, unused_days: float = UNUSED_DAYS, now: float | None = None
) -> dict[Path, int]:
    """Remove slice files that were not used for some days; return them with their sizes.

    A process that is still reading a removed file is not affected, because its memory map keeps the
    content.

    Raises:
        FedsgcgError: DAT-113 when a file cannot be removed.
    """
    limit = (time.time() if now is None else now) - unused_days * 86400
    gone = {path: size for path, size in cache_files(cache).items() if path.stat().st_mtime < limit}
    for path in gone:
        try:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
        except OSError as error:
            raise cache_error(error, path) from error
    return gone
