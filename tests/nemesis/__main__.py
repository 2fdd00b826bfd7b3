"""`python -m tests.nemesis --seconds 600`: faults for ten minutes, then the checker."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

from fedsgcg.common.images.phantoms import write_hospitals
from tests.nemesis import checker
from tests.nemesis.driver import Driver, run


def report(driver: Driver, history: checker.History, found: list[checker.Violation]) -> str:
    """Return the table of faults, as Markdown."""
    lines = [
        "| fault | times | seen | resumed | codes at the site |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, times in sorted(Counter(line["fault"] for line in driver.table).items()):
        rows = [line for line in driver.table if line["fault"] == name]
        seen = ", ".join(sorted({row["seen"] for row in rows if row["seen"]}))
        codes = "; ".join(sorted({row["codes"] for row in rows if row["codes"]}))
        lines.append(f"| {name} | {times} | {seen} | {sum(r['resumes'] for r in rows)} | {codes} |")
    ends = Counter(study.outcome["status"] for study in history.studies)
    rounds = sum(len(study.checkpoints) for study in history.studies)
    replies = [reply for sent in history.sent.values() for reply in sent]
    poisoned = sum(bool(reply.poison) for reply in replies)
    lines += [
        "",
        f"Studies: {', '.join(f'{count} {status}' for status, count in sorted(ends.items()))}; "
        f"{rounds} rounds, {len(replies)} replies, {poisoned} of them poisoned.",
        "",
        *(f"- {violation}" for violation in found),
    ]
    return "\n".join(lines)


def main() -> int:
    """Run, check, print and write `report.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--deadline", type=float, default=20, help="seconds of an exchange")
    parser.add_argument("--folder", type=Path, default=Path("runs/nemesis"))
    given = parser.parse_args()
    folder = (given.folder / time.strftime("%Y%m%d-%H%M%S")).resolve()
    hospitals = write_hospitals(folder / "data", cases_per_site=5, shape=(6, 40, 40), seed=7)
    start = time.monotonic()
    driver = run(folder, hospitals, given.seconds, given.seed, given.deadline)
    history = checker.History.read(folder)
    found = checker.check(history)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = (
        f"`python -m tests.nemesis --seconds {given.seconds:.0f} --seed {given.seed}` on "
        f"{machine}, "
        f"{time.strftime('%Y-%m-%d')}: {time.monotonic() - start:.0f} s.\n\n"
        + report(driver, history, found)
    )
    (folder / "report.md").write_text(text + "\n")
    print(text)
    print("I1 to I10 hold" if not found else f"{len(found)} violations", folder)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
