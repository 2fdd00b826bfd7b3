"""Fuzzes every decoder: an input gives an object or a `FedsgcgError`, in bounded time and memory.

    python -m tests.faults.fuzz --cases 100000 [--only NAME] [--seed 1]

An input that does anything else is kept in `tests/faults/corpus/NAME`, which `tests/faults` decodes
again in every run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError
from tests.faults.fuzz.mutations import bytes_of
from tests.faults.fuzz.targets import Target, targets

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
MEMORY = 512 * 2**20
"""Bytes that a decoder may allocate for an input of a few kilobytes."""

PATIENCE_S = 20


class Hang(BaseException):
    """A decoder that does not return; no `except Exception` may hide it."""


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """Refuse more memory than `MEMORY` beyond what is mapped now; an alarm raises `Hang`."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(target: Target, data: bytes) -> str:
    """Return "valid" or an error code.

    Raises:
        Exception: Whatever else the decoder raises; MemoryError beyond the bound.
        Hang: It takes longer than `PATIENCE_S` (inside `bounds`).
    """
    signal.alarm(PATIENCE_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.decode(data)
    except FedsgcgError as error:
        # A reader that turns every exception into a code must not hide the bound of memory.
        cause = error.__cause__
        while cause is not None:
            if isinstance(cause, MemoryError):
                raise cause from None
            cause = cause.__cause__
        return error.code
    finally:
        signal.alarm(0)
    return "valid"


def keep(target: Target, data: bytes) -> Path:
    """Write a failing input to the corpus."""
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:12]
    path.write_bytes(data)
    return path


def fuzz(target: Target, cases: int, seed: int, faults: dict[str, str]) -> Counter[str]:
    """Decode some mutated inputs; a new kind of fault is added to `faults` and the corpus."""
    seen: Counter[str] = Counter()

    @seeded(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def case(number: int) -> None:
        source = random.Random(number)
        honest = source.choice(target.seeds)
        try:
            data = target.mutate(honest, source)
        except Exception:  # the library refuses to write such a thing
            data = bytes_of(honest, source)
        try:
            seen[outcome(target, data)] += 1
        except (Exception, Hang) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{target.name}: {type(error).__name__} at {place.filename}:{place.lineno}"
            seen["fault"] += 1
            if kind not in faults:
                faults[kind] = f"{error!s:.200}\n  {keep(target, data)}"

    with bounds():
        case()
    return seen


def main() -> int:
    """Fuzz all targets in turn; the number of cases is shared out by their cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    given_ = parser.parse_args()
    faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        chosen = [target for target in targets(Path(name)) if given_.only in target.name]
        share = given_.cases / sum(1 / target.cost for target in chosen)
        total = 0
        for target in chosen:
            start, cases = time.monotonic(), max(10, round(share / target.cost))
            seen = fuzz(target, cases, given_.seed, faults)
            total += sum(seen.values())
            codes = ", ".join(f"{code} {count}" for code, count in sorted(seen.items()))
            print(f"{target.name:28} {time.monotonic() - start:6.1f} s  {codes}", flush=True)
    print(f"{total} cases, {len(faults)} kinds of fault")
    for kind, text in faults.items():
        print(f"{kind}\n  {text}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
