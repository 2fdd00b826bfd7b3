"""`python -m tests.nemesis --seconds 600`: faults for ten minutes, then the checker.

Leave the code alone meanwhile: a hospital that is restarted refuses changed software (POL-708).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

from fedsgcg.common.images.phantoms import write_hospitals
from tests.nemesis import checker, coverage
from tests.nemesis.driver import run
from tests.nemesis.history import History, Violation
from tests.nemesis.schedule import BAD_REPLIES


def report(history: History, found: list[Violation]) -> str:
    """Return what was made and seen, as Markdown."""
    made = [line for line in history.lines if line["event"] == "fault.over"]
    lines = [
        "| fault | times | without effect | seen | resumed | seconds to the next round | codes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted({line["fault"] for line in made if line["fault"] not in BAD_REPLIES}):
        rows = [line for line in made if line["fault"] == name]
        seen = ", ".join(sorted({row["seen"] for row in rows if row["seen"]}))
        codes = "; ".join(sorted({row["codes"] for row in rows if row["codes"]}))
        idle = sum(not row["effect"] for row in rows)
        resumes = sum(row["resumes"] for row in rows)
        longest = max(row["seconds"] for row in rows)
        counts = f"{len(rows)} | {idle} | {seen} | {resumes} | {longest:.0f}"
        lines.append(f"| {name} | {counts} | {codes} |")
    lines += ["", "| bad replies | sent | refused, or counted once |", "| --- | --- | --- |"]
    for name, (sent, good) in sorted(coverage.bad_replies(history).items()):
        lines.append(f"| {name} | {sent} | {good} |")
    lines += ["", "| outcome | times |", "| --- | --- |"]
    lines += [f"| {name} | {times} |" for name, times in coverage.outcomes(history).items()]
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
    hospitals = write_hospitals(folder / "hospitals", cases_per_site=5, shape=(6, 40, 40), seed=7)
    start = time.monotonic()
    run(folder, hospitals, given.seconds, given.seed, given.deadline)
    history = History.read(folder)
    found = [*checker.check(history), *coverage.promised(history)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = (
        f"`python -m tests.nemesis --seconds {given.seconds:.0f} --seed {given.seed}` on "
        f"{machine}, "
        f"{time.strftime('%Y-%m-%d')}: {time.monotonic() - start:.0f} s.\n\n"
        + report(history, found)
    )
    (folder / "report.md").write_text(text + "\n")
    print(text)
    print(
        "I1 to I11 hold, and the promised faults and outcomes were seen"
        if not found
        else f"{len(found)} violations",
        folder,
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
