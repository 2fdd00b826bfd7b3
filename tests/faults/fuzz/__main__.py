"""Fuzzes every decoder: an input gives an object or a `FedsgcgError`, in bounded time and memory.

    python -m tests.faults.fuzz --cases 100000 [--only NAME] [--seed 1]

An input that does anything else is kept in `tests/faults/corpus/NAME`, which `tests/faults` decodes
again in every run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.fuzz.runner import fuzz, keep, outcome_in_time
from tests.faults.fuzz.targets import targets


def main() -> int:
    """Fuzz all targets in turn; the number of cases is shared out by their cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    faults: dict[str, tuple[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as name:
        chosen = [target for target in targets(Path(name)) if given.only in target.name]
        share = given.cases / sum(1 / target.cost for target in chosen)
        total, kept = 0, {}
        for target in chosen:
            start, cases = time.monotonic(), max(10, round(share / target.cost))
            known = set(faults)
            seen = fuzz(target, cases, given.seed, outcome_in_time, faults)
            kept |= {kind: keep(target, faults[kind][1]) for kind in faults if kind not in known}
            total += sum(seen.values())
            codes = ", ".join(f"{code} {count}" for code, count in sorted(seen.items()))
            print(f"{target.name:28} {time.monotonic() - start:6.1f} s  {codes}", flush=True)
    print(f"{total} cases, {len(faults)} kinds of fault")
    for kind, (text, _) in faults.items():
        print(f"{kind}\n  {text}\n  {kept[kind]}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
