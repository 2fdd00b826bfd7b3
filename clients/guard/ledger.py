"""The ledger of what left this hospital: one JSON line per message, in a hash chain.

Each line contains the hash of the line before it, and is on the disk before its message leaves.
Changing, removing or swapping a line breaks the chain, and `verify` reports where. An incomplete
last line is the result of a crash; its message never left, so it is dropped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from fedsgcg.common.errors import fail
from fedsgcg.common.files.system import lock

START = "0" * 64  # `previous` of the first line


def append(
    path: Path,
    *,
    round_number: int,
    kind: str,
    parts: Mapping[str, int],
    withheld: Sequence[str],
    sha256: str,
    note: str = "",
) -> None:
    """Append one line and wait until it is on the disk.

    Args:
        path: The ledger; created with its folder if missing.
        round_number: Round of the message.
        kind: Type of the message that is answered, e.g. `train`.
        parts: Bytes of each part of the reply.
        withheld: Names of the classes that the privacy floors withheld.
        sha256: Digest of the reply.
        note: Remark for the site's staff, e.g. why a request was refused.

    Raises:
        FedsgcgError: SITE-501 when the line cannot be written (disk full, no permission) or the
            chain is broken; CFG-008 when the file system does not support locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that closing the file does not retry a write that a full disk refused.
        with path.open("a+b", buffering=0) as file:
            lock(file, wait=True, action="Set home in site.yaml to a folder on a local disk.")
            seq, previous = _tail(file)
            entry = {
                "seq": seq,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "round": round_number,
                "kind": kind,
                "parts": dict(parts),
                "withheld": list(withheld),
                "sha256": sha256,
                "previous": previous,
            } | ({"note": note} if note else {})
            _write(file, json.dumps(entry | {"hash": seal(entry)}) + "\n")
    except OSError as error:
        raise fail(
            "SITE-501",
            where=str(path),
            found=str(error),
            expected="a writable ledger",
            action="free disk space or correct the permissions; the site answers again as soon as "
            "it can write",
        ) from error


def verify(path: Path) -> int:
    """Verify the chain and return the number of lines.

    Raises:
        FedsgcgError: SITE-501 with the first line that does not fit.
    """
    return len(entries(path))


def entries(path: Path) -> list[dict[str, Any]]:
    """Return every line, after verifying the chain.

    Raises:
        FedsgcgError: SITE-501 with the first line that does not fit.
    """
    previous, found = START, []
    for seq, line in enumerate(path.read_bytes().splitlines(keepends=True)):
        entry = _read(line, seq)
        if entry["seq"] != seq or entry["previous"] != previous:
            raise _broken(seq)
        previous = str(entry["hash"])
        found.append(entry)
    return found


def seal(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a line's content, which includes the previous line's hash."""
    content = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tail(file: FileIO) -> tuple[int, str]:
    """Return (number of the next line, hash of the last one); drop an incomplete last line."""
    file.seek(0)
    content = file.read()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        file.truncate(complete)
    lines = content[:complete].splitlines()
    if not lines:
        return 0, START
    entry = _read(lines[-1], len(lines) - 1)
    return len(lines), str(entry["hash"])


def _write(file: FileIO, line: str) -> None:
    end, data = file.seek(0, os.SEEK_END), line.encode()
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)  # remove a partial line, so that the next one can be appended
        raise


def _read(line: bytes, seq: int) -> dict[str, Any]:
    """Parse one line and verify its hash."""
    try:
        entry = json.loads(line)
        intact = bool(line) and entry["hash"] == seal(entry) and {"seq", "previous"} <= set(entry)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise _broken(seq)
    return dict(entry)


def _broken(seq: int) -> Exception:
    return fail(
        "SITE-501",
        found=f"line {seq} does not match the hash chain",
        expected="unchanged lines",
    )
