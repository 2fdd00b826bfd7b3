"""Keeps every reply of a hospital as a file, for the checker."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict


def record(
    folder: Path, records: RecordDict, kind: str, poison: str = "", twice: bool = False
) -> None:
    """Write one reply to `folder/NUMBER.npz`.

    Its entries are bytes by `record/key`; `facts` is JSON with kind, poison, twice and time.
    """
    folder.mkdir(exist_ok=True)
    entries: dict[str, Any] = {}
    for name, content in records.items():
        for key, value in content.items():
            data = getattr(value, "data", value)
            if not isinstance(data, bytes):
                data = json.dumps(data).encode()
            entries[f"{name}/{key}"] = np.frombuffer(data, np.uint8)
    facts = {"kind": kind, "poison": poison, "twice": twice, "time": time.time()}
    entries["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **entries)
    partial = folder / "partial"
    partial.write_bytes(buffer.getvalue())
    partial.rename(folder / f"{time.time_ns()}.npz")
