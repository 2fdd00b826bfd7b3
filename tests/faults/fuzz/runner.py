"""Runs a decoder on mutated inputs, in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError
from tests.faults.fuzz.mutations import bytes_of
from tests.faults.fuzz.targets import Target

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
MEMORY = 512 * 2**20
"""Bytes that a decoder may allocate for an input of a few kilobytes."""

PATIENCE_S = 20


class Hang(BaseException):
    """A decoder that does not return; no `except Exception` may hide it."""


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Refuse more memory than `MEMORY` beyond what is mapped now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(target: Target, data: bytes) -> str:
    """Return "valid" or an error code.

    Raises:
        Exception: Whatever else the decoder raises; MemoryError beyond the bound.
    """
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
    return "valid"


def outcome_in_time(target: Target, data: bytes) -> str:
    """Return `outcome`; raises `Hang` if it takes too long."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise Hang

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE_S)
    try:
        return outcome(target, data)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def keep(target: Target, data: bytes) -> Path:
    """Write a failing input to the corpus."""
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:12]
    path.write_bytes(data)
    return path


def fuzz(
    target: Target,
    cases: int,
    seed: int,
    decode: Callable[[Target, bytes], str],
    faults: dict[str, tuple[str, bytes]],
    current: Path | None = None,
) -> Counter[str]:
    """Decode some mutated inputs and count outcomes; one input of each kind of fault is kept.

    Args:
        target: The decoder.
        cases: Number of inputs.
        seed: Seed of the inputs.
        decode: `outcome` or `outcome_in_time`.
        faults: Kind of fault -> text and input; new kinds are added.
        current: File that always holds the input being decoded.
    """
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
        if current is not None:
            current.write_bytes(data)
        try:
            seen[decode(target, data)] += 1
        except (Exception, Hang) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{target.name}: {type(error).__name__} at {place.filename}:{place.lineno}"
            seen["fault"] += 1
            if kind not in faults:
                faults[kind] = (f"{error!s:.200}", data)

    with bounded_memory():
        case()
    return seen


def fuzz_apart(
    target: Target, cases: int, seed: int, folder: Path
) -> tuple[Counter[str], dict[str, tuple[str, bytes]]]:
    """Fuzz in a child process: a decoder that crashes or never returns ends only the child.

    Args:
        target: The decoder.
        cases: Number of inputs.
        seed: Seed of the inputs.
        folder: For the files between the processes.

    Returns:
        Outcomes and their number; kind of fault -> text and input.
    """
    current, result = folder / "current", folder / "result.json"
    for path in (current, result):
        path.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            faults: dict[str, tuple[str, bytes]] = {}
            seen = fuzz(target, cases, seed, outcome_in_time, faults, current)
            kinds = {kind: (text, data.hex()) for kind, (text, data) in faults.items()}
            result.write_text(json.dumps({"seen": seen, "faults": kinds}))
            code = 0
        finally:
            os._exit(code)
    end = _end_of(child, current)
    if result.exists():
        found = json.loads(result.read_text())
        kinds = {
            kind: (text, bytes.fromhex(data)) for kind, (text, data) in found["faults"].items()
        }
        return Counter(found["seen"]), kinds
    data = current.read_bytes() if current.exists() else b""
    return Counter(fault=1), {f"{target.name}: {end}": (end, data)}


def _end_of(child: int, current: Path) -> str:
    """Wait for a child and return how it ended; kill it if its input does not change for long."""
    start = time.time()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            number = os.waitstatus_to_exitcode(status)
            return f"ended by signal {-number}" if number < 0 else f"ended with {number}"
        with contextlib.suppress(OSError):
            start = max(start, current.stat().st_mtime)
        if time.time() - start > 2 * PATIENCE_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"did not return in {2 * PATIENCE_S} s"
        time.sleep(0.02)
