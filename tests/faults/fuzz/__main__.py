"""Fuzzes every decoder: an input gives an object or a `FedsgcgError`, in bounded time and memory.

    python -m tests.faults.fuzz --cases 100000 [--minutes 10] [--only NAME] [--seed 1]

The decoders take turns, so that a run that is cut short, by `--minutes` or Ctrl-C, has reached all
of them. An input that does anything else, or crashes the process, is kept in
`tests/faults/corpus/NAME`, which `tests/faults` decodes again in every run.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults.fuzz.runner import fuzz_apart, keep
from tests.faults.fuzz.targets import Target, targets

TURN = 40
"""Inputs of a decoder of cost 1 in each turn."""


def main() -> int:
    """Fuzz all targets in turns; the number of cases is shared out by their cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=0.0, help="0 = until all cases were tried")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    start = time.monotonic()
    end = start + 60 * given.minutes if given.minutes else float("inf")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [target for target in targets(folder / "targets") if given.only in target.name]
        run = Run(chosen, folder)
        with contextlib.suppress(KeyboardInterrupt):
            run.turns(given.cases, given.seed, end)
    print(run.report())
    print(f"{run.cases} cases, {len(run.kept)} kinds of fault, {time.monotonic() - start:.0f} s")
    return 1 if run.kept else 0


class Run:
    """The decoders, what was seen of each, and the kept faults.

    Args:
        chosen: The decoders.
        folder: For the files between the processes.
    """

    def __init__(self, chosen: Sequence[Target], folder: Path) -> None:
        self._chosen = chosen
        self._folder = folder
        self.seen: dict[str, Counter[str]] = {target.name: Counter() for target in chosen}
        self.kept: dict[str, Path] = {}

    @property
    def cases(self) -> int:
        """Inputs so far."""
        return sum(counts.total() for counts in self.seen.values())

    def turns(self, cases: int, seed: int, end: float) -> None:
        """Give every decoder its turn until all cases were tried or the time is over."""
        turn = 0
        while self.cases < cases:
            for target in self._chosen:
                if turn and time.monotonic() > end:
                    return
                number = max(1, round(TURN / target.cost))
                seen, faults = fuzz_apart(target, number, seed + 1000 * turn, self._folder)
                self.seen[target.name] += seen
                for kind, (text, data) in faults.items():
                    if kind not in self.kept:
                        self.kept[kind] = keep(target, data)
                        print(f"{kind}\n  {text}\n  {self.kept[kind]}", flush=True)
            turn += 1

    def report(self) -> str:
        """Return a line of each decoder: its inputs and their outcomes."""
        lines = []
        for name, counts in self.seen.items():
            codes = ", ".join(f"{code} {count}" for code, count in sorted(counts.items()))
            lines.append(f"{name:28} {counts.total():7}  {codes}")
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
