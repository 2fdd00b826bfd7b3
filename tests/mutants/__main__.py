"""Changes the pure core in small ways and counts how many changes its tests notice.

    python -m tests.mutants --sample 200 [--minutes 10] [--only admission] [--seed 1]

The core is what decides about numbers: statistics, admission, decoders of payloads, merges. Each
change is tried in a child of this process, in which the changed source takes the place of the
module's file. The modules take turns, so that a run that is cut short by `--minutes` has tried all
of them. Changes that the tests do not notice are printed: each is a missing test, or changes
nothing that matters.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Final

import hypothesis
import pytest

from tests.mutants.changes import Change, changes

ROOT = Path(__file__).resolve().parents[2]
CORE: Final[Mapping[str, tuple[str, ...]]] = {
    "server/admission.py": (
        "tests/unit/server/test_admission.py",
        "tests/unit/server/test_admission_limits.py",
    ),
    "server/aggregation/fedavg.py": (
        "tests/unit/server/test_merge.py",
        "tests/laws/test_merge_laws.py",
        "tests/laws/test_norm_moments_laws.py",
        "tests/laws/test_shares_laws.py",
    ),
    "server/aggregation/shares.py": ("tests/laws/test_shares_laws.py",),
    "server/aggregation/robust.py": ("tests/laws/test_robust_laws.py",),
    "server/aggregation/class_statistics.py": (
        "tests/unit/server/test_merge.py",
        "tests/laws/test_merge_laws.py",
        "tests/laws/test_robust_laws.py",
    ),
    "common/statistics.py": (
        "tests/laws/test_statistics_laws.py",
        "tests/laws/test_removal_laws.py",
    ),
    "common/wire/norm_moments.py": ("tests/laws/test_norm_moments_laws.py",),
    "common/wire/payload.py": (
        "tests/laws/test_payload_laws.py",
        "tests/unit/common/test_payload_edges.py",
        "tests/faults/test_payload_bombs.py",
    ),
}
"""Module -> tests that must notice a change of it."""

TRAINS: Final = "after_a_resume"
"""Part of the names of tests that train whole studies."""

PATIENCE_S = 60
EXAMPLES = 25
"""Inputs of a property test, always the same: a change that needs more to be noticed counts."""


def noticed(path: Path, change: Change, tests: Sequence[str]) -> bool:
    """Whether the tests of a module fail, or do not end, with a change."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return status != 0
    signal.alarm(PATIENCE_S)
    code = 1
    try:
        put_in_place(path, change.source.encode())
        code = run_tests(tests)
    finally:
        os._exit(code)


def run_tests(tests: Sequence[str], *more: str) -> int:
    """Run tests without those that train, quietly; returns pytest's exit code."""
    hypothesis.settings.register_profile(
        "mutants", max_examples=EXAMPLES, derandomize=True, database=None, deadline=None
    )
    hypothesis.settings.load_profile("mutants")
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *more]
    arguments += ["-k", f"not {TRAINS}"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return int(pytest.main([*arguments, *(str(ROOT / name) for name in tests)]))


def preload() -> None:
    """Import what the tests import, other than this project, so that no child has to."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        os.close(readable)
        try:
            run_tests(sorted({name for tests in CORE.values() for name in tests}), "--collect-only")
            own = ("fedsgcg", "tests", "__main__", "conftest")
            names = [name for name in sys.modules if name.partition(".")[0] not in own]
            with os.fdopen(writable, "w") as pipe:
                json.dump(names, pipe)
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        names = json.load(pipe)
    os.waitpid(child, 0)
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


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


def in_turns(only: str, sample: int, seed: int) -> Iterator[tuple[str, Change]]:
    """Yield a sample of the changes of some modules, one of each module after the other."""
    source = random.Random(seed)
    queues = []
    for name in CORE:
        if only in name:
            found = list(changes((ROOT / name).read_text()))
            source.shuffle(found)
            queues.append([(name, change) for change in found])
    rounds = itertools.zip_longest(*queues)
    mixed = (one for turn in rounds for one in turn if one is not None)
    yield from itertools.islice(mixed, sample)


def main() -> int:
    """Try a sample of all changes; the score is the share that is noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.devnull
    start = time.monotonic()
    end = start + 60 * given.minutes
    preload()
    score: dict[str, list[bool]] = {}
    for name, change in in_turns(given.only, given.sample, given.seed):
        if time.monotonic() > end:
            break
        found = noticed(ROOT / name, change, CORE[name])
        score.setdefault(name, []).append(found)
        if not found:
            print(f"not noticed: {name}:{change.line}  {change.what}", flush=True)
    for name, results in score.items():
        print(f"{name:45} {sum(results):4} of {len(results)}")
    total = [found for results in score.values() for found in results]
    print(
        f"{sum(total)} of {len(total)} noticed ({sum(total) / max(len(total), 1):.0%}), "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
