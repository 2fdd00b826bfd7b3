"""Results of checks at a hospital: a verdict, what was found and how to fix it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from fedsgcg.common.errors import CODES, Problem

Verdict = Literal["ok", "note", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        area: `files`, `site`, `device`, `disk`, `clock` or `link`.
        name: Case, folder or name of the check.
        verdict: `ok`, `warn` (works, but needs a look) or `fail` (does not work).
        found: What was found.
        action: How to fix it.
        code: Error code, "" for `ok`.
    """

    area: str
    name: str
    verdict: Verdict
    found: str = ""
    action: str = ""
    code: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the finding as a dictionary, with the meaning of its code."""
        return asdict(self) | {"meaning": CODES.get(self.code, "")}

    @classmethod
    def of(cls, area: str, problem: Problem, verdict: Verdict = "fail") -> Finding:
        """Turn a problem into a finding."""
        found = problem.found + (f"; expected {problem.expected}" if problem.expected else "")
        return cls(area, problem.where, verdict, found, problem.action, problem.code)


def shortened(findings: Sequence[Finding], most: int) -> list[Finding]:
    """Return findings without the files that are right, and `most` at most with the same problem.

    What follows in place of the others is their number.
    """
    alike = Counter((one.area, one.code, one.verdict) for one in findings)
    shown: Counter[tuple[str, str, str]] = Counter()
    kept = []
    for one in findings:
        key = one.area, one.code, one.verdict
        if one.area == "files" and one.verdict == "ok":
            continue
        shown[key] += 1
        if not one.code or shown[key] <= most:
            kept.append(one)
        elif shown[key] == most + 1:
            found = f"{alike[key] - most} more with this problem"
            kept.append(
                replace(one, name="...", found=found, action="The option --all lists them.")
            )
    return kept
