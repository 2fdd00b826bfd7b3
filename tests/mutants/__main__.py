"""Changes the pure core in small ways and counts how many changes its tests notice.

    python -m tests.mutants --sample 200 [--only admission] [--seed 1]

Each change is tried in a child of this process, in which the changed source takes the place of the
module's file. Changes that the tests do not notice are printed: each is a missing test, or changes
nothing that matters.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import random
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Final

import pytest

from tests.mutants.changes import Change, changes

ROOT = Path(__file__).resolve().parents[2]
CORE: Final = {
    "server/admission.py": (
        "tests/unit/server/test_admission.py",
        "tests/unit/server/test_admission_limits.py",
    ),
    "server/aggregation/fedavg.py": (
        "tests/unit/server/test_merge.py",
        "tests/laws/test_merge_laws.py",
        "tests/laws/test_norm_moments_laws.py",
    ),
    "server/aggregation/class_statistics.py": (
        "tests/unit/server/test_merge.py",
        "tests/laws/test_merge_laws.py",
    ),
    "server/aggregation/prototypes.py": (
        "tests/unit/server/test_prototypes.py",
        "tests/laws/test_memory_laws.py",
    ),
    "common/statistics.py": (
        "tests/laws/test_statistics_laws.py",
        "tests/laws/test_removal_laws.py",
    ),
    "common/wire/payload.py": ("tests/laws/test_payload_laws.py",),
    "server/records/checkpoint.py": ("tests/unit/server/test_journal.py",),
    "server/records/journal.py": ("tests/unit/server/test_journal.py",),
}
PRELOADED = ("numpy", "scipy.linalg", "pyarrow", "hypothesis.extra.numpy", "safetensors.numpy")
PATIENCE_S = 90


def noticed(path: Path, change: Change, tests: tuple[str, ...]) -> bool:
    """Whether the tests of a module fail, or do not end, with a change."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return status != 0
    signal.alarm(PATIENCE_S)
    code = 1
    try:
        put_in_place(path, change.source.encode())
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=60"]
            code = int(pytest.main([*arguments, *(str(ROOT / name) for name in tests)]))
    finally:
        os._exit(code)


def put_in_place(path: Path, source: bytes) -> None:
    """Make the import of one file read another source, and no compiled copy."""
    read = SourceFileLoader.get_data

    def get_data(self: SourceFileLoader, name: str) -> bytes:
        if os.path.realpath(self.path) != str(path):
            return read(self, name)
        if name != self.path:
            raise OSError("no compiled copy")
        return source

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign]


def main() -> int:
    """Try a sample of all changes; the score is the share that is noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.devnull
    for name in PRELOADED:
        importlib.import_module(name)
    every = [
        (ROOT / name, change, tests)
        for name, tests in CORE.items()
        if given.only in name
        for change in changes((ROOT / name).read_text())
    ]
    source = random.Random(given.seed)
    chosen = sorted(source.sample(range(len(every)), min(given.sample, len(every))))
    score: dict[str, list[bool]] = {}
    start = time.monotonic()
    for place in chosen:
        path, change, tests = every[place]
        found = noticed(path, change, tests)
        name = path.relative_to(ROOT).as_posix()
        score.setdefault(name, []).append(found)
        if not found:
            print(f"not noticed: {name}:{change.line}  {change.what}", flush=True)
    for name, results in score.items():
        print(f"{name:45} {sum(results):4} of {len(results)}")
    total = [found for results in score.values() for found in results]
    print(
        f"{sum(total)} of {len(total)} noticed ({sum(total) / max(len(total), 1):.0%}), of "
        f"{len(every)} possible changes, {time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
