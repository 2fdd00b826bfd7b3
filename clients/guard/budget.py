"""The privacy budget of a site: what it released with noise, and how much more it may.

`privacy-budget.jsonl` lists every Gaussian mechanism that was applied to the site's patients, in
whichever run, fold, seed or study. All of it is composed by one accountant
(`common.differential_privacy.accounting`), as if it concerned the same patients: a patient who was
in some of the runs only lost at most as much. A line is on the disk before the patients' data is
read; it stays if the work fails. When the budget is spent, the site contributes no more (row 63).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedsgcg.clients.guard.releases import ListFile
from fedsgcg.common.differential_privacy.accounting import Spending, epsilon_of
from fedsgcg.common.errors import fail

FILE: Final = "privacy-budget.jsonl"
WHAT: Final = "the list of what this site spent of its privacy budget"


@dataclass(frozen=True)
class Charge:
    """One release that is about to happen.

    Attributes:
        channel: `statistics` or `weights`.
        run: Digest of run, fold and plan.
        request: Digest of the request that is answered.
        spending: The mechanism.
        seeded: Whether the noise is repeated if the request is; it is then charged once.
    """

    channel: str
    run: str
    request: str
    spending: Spending
    seeded: bool = False

    def line(self) -> dict[str, Any]:
        """Return the line of the budget file."""
        return {
            "channel": self.channel,
            "run": self.run,
            "request": self.request,
            "noise": self.spending.noise,
            "sampling": self.spending.sampling,
            "steps": self.spending.steps,
            "seeded": self.seeded,
        }


@dataclass(frozen=True)
class Budget:
    """What a site may spend.

    Attributes:
        epsilon: Most epsilon.
        delta: At this delta.
    """

    epsilon: float
    delta: float


def charge(home: Path, new: Charge, budget: Budget) -> float:
    """Record a release before it happens, if the budget allows it.

    Args:
        home: The site's folder.
        new: The release. A repeated request costs again, because its noise is drawn anew, unless
            the noise is seeded.
        budget: What the site may spend.

    Returns:
        Epsilon of everything that this site has released, this release included.

    Raises:
        FedsgcgError: PRV-975 when the budget cannot pay for it, SITE-501 when the file cannot be
            read or written. Nothing is then released.
    """
    with ListFile(home / FILE, _checked, WHAT) as book:
        known = [_spending(line) for line in book.lines]
        if new.seeded and any(_repeats(line, new) for line in book.lines):
            return epsilon_of(known, budget.delta)
        total = epsilon_of([*known, new.spending], budget.delta)
        if total > budget.epsilon:
            spent = epsilon_of(known, budget.delta)
            raise fail(
                "PRV-975",
                where=str(home / FILE),
                found=f"epsilon = {spent:.4g} is spent; this release would make it {total:.4g}",
                expected=f"at most {budget.epsilon:g} at delta={budget.delta:g}",
                action="end this hospital's contribution, or let those responsible for its "
                "patients decide on a larger dp_epsilon in its site.yaml",
            )
        book.append(new.line())
        return total


def require_affordable(home: Path, run: str, whole_run: Sequence[Spending], budget: Budget) -> None:
    """Refuse a run that the budget cannot pay for to its end, before it starts.

    Args:
        home: The site's folder.
        run: Digest of the run; what it has already spent is part of `whole_run`.
        whole_run: What all its rounds release.
        budget: What the site may spend.

    Raises:
        FedsgcgError: PRV-974, SITE-501.
    """
    with ListFile(home / FILE, _checked, WHAT) as book:
        others = [_spending(line) for line in book.lines if line["run"] != run]
    total = epsilon_of([*others, *whole_run], budget.delta)
    if total > budget.epsilon:
        raise fail(
            "PRV-974",
            where=str(home / FILE),
            found=f"epsilon = {epsilon_of(others, budget.delta):.4g} spent by other runs, "
            f"{total:.4g} with this one",
            expected=f"at most {budget.epsilon:g} at delta={budget.delta:g}",
            action="plan fewer rounds or more noise",
        )


def spent(home: Path, delta: float) -> float:
    """Return epsilon of everything that a site has released with noise."""
    if not (home / FILE).exists():
        return 0.0
    with ListFile(home / FILE, _checked, WHAT) as book:
        return epsilon_of(map(_spending, book.lines), delta)


def _repeats(line: Mapping[str, Any], new: Charge) -> bool:
    return line == new.line()


def _spending(line: Mapping[str, Any]) -> Spending:
    return Spending(line["noise"], line["sampling"], line["steps"])


def _checked(line: Any) -> dict[str, Any]:
    """Return a line with the fields that it must have."""
    checked: dict[str, Any] = {
        "channel": str(line["channel"]),
        "run": str(line["run"]),
        "request": str(line["request"]),
        "noise": float(line["noise"]),
        "sampling": float(line["sampling"]),
        "steps": int(line["steps"]),
        "seeded": bool(line["seeded"]),
    }
    if not (checked["noise"] > 0 and 0 < checked["sampling"] <= 1 and checked["steps"] >= 1):
        raise ValueError("numbers out of range")
    return checked
