"""Which faults are made in which study, and what a run promises to have exercised.

A run is a list of acts; each act is one study, or several when one has too few rounds left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.nemesis.resident import POISONS

PARTITION: Final = "site cut off for 3 rounds"
PAUSED: Final = "replies rejected until a pause"
TWICE: Final = "replies sent twice"

BAD_REPLIES: Final[dict[str, dict[str, object]]] = {
    TWICE: {"duplicate": True},
    **{name: {"poison": name} for name in POISONS},
}
"""What is wrong with a hospital's replies -> content of its `nemesis.json`."""

HARMLESS: Final = (
    ("kill -9 of the server", "kill -9 of the round loop", "disk full at the coordinator"),
    ("site suspended", "server suspended", "kill -9 of a worker"),
    ("1 % loss", "2 s latency", "100 kB/s"),
)
"""Faults that cost time and nothing else: a study with a long deadline ends `completed`."""

SINGLE: Final = ("kill -9 of a site", "clock 10 minutes wrong", "disk full at a site")
"""Faults that cost a site's reply; together with bad replies of another they may stop a run."""

ROUNDS: Final = {PARTITION: 6, PAUSED: 8, "": 3}
"""Rounds that a fault needs, where it is more than `FEW`."""

FEW: Final = 2
LONG_S: Final = 200.0
"""Seconds from which a run promises every fault and every kind of bad reply."""

PATIENT_S: Final = 120.0
"""Deadline of an exchange in a study whose faults must cost nothing but time."""

COMPLETED: Final = "completed with the simulation's model"
OTHERS: Final = "the others went on for 3 rounds, and the site came back"
PAUSE: Final = "a site was paused, and asked again"
DEGRADED: Final = "degraded with codes"
RESUMED: Final = "resumed"


@dataclass(frozen=True)
class Step:
    """A fault at one hospital and bad replies of another; either may be missing ("")."""

    fault: str = ""
    replies: str = ""

    @property
    def rounds(self) -> int:
        """Rounds that must be left in the study."""
        return ROUNDS.get(self.fault, FEW)


@dataclass
class Act:
    """Steps that are made one after the other.

    Attributes:
        name: Shown in the record.
        steps: The steps.
        rounds: Rounds of a study.
        deadline_s: Seconds of an exchange.
    """

    name: str
    steps: Iterator[Step]
    rounds: int
    deadline_s: float
    waiting: list[Step] = field(default_factory=list)

    def peek(self) -> Step | None:
        """Return the next step, None when there is none."""
        if not self.waiting:
            self.waiting.extend(step for step in [next(self.steps, None)] if step)
        return self.waiting[0] if self.waiting else None

    def take(self) -> None:
        """Remove the next step."""
        self.waiting.pop(0)


@dataclass(frozen=True)
class Promise:
    """What a run must have exercised: faults, bad replies, and what came of them."""

    faults: tuple[str, ...]
    replies: tuple[str, ...]
    outcomes: tuple[str, ...] = (COMPLETED, OTHERS, PAUSE, DEGRADED)


def harmless(source: random.Random, all_of_them: bool) -> list[Step]:
    """Return one fault of each group of `HARMLESS`, or all; one with replies sent twice."""
    names = [source.choice(group) for group in HARMLESS]
    if all_of_them:
        names = [name for group in HARMLESS for name in group]
    source.shuffle(names)
    return [Step(name, TWICE if number == 0 else "") for number, name in enumerate(names)]


def alone(source: random.Random, all_of_them: bool) -> list[Step]:
    """Return faults of one site while the others are honest."""
    poisons = sorted(POISONS) if all_of_them else []
    source.shuffle(poisons)
    return [Step(PARTITION, TWICE), Step(PAUSED), *(Step("", poison) for poison in poisons)]


def pairs(source: random.Random, faults: Iterable[str], end: float) -> Iterator[Step]:
    """Pairs of a fault and bad replies: `SINGLE` once, then all at random until some time."""

    def endless(names: Iterable[str]) -> Iterator[str]:
        while True:
            mixed = list(names)
            source.shuffle(mixed)
            yield from mixed

    replies = endless(BAD_REPLIES)
    for name in SINGLE:
        yield Step(name, next(replies))
    for name in endless(faults):
        if time.monotonic() >= end:
            return
        yield Step(name, TWICE if name == PARTITION else next(replies))


def acts(
    source: random.Random, faults: Iterable[str], seconds: float, deadline_s: float
) -> tuple[list[Act], Promise]:
    """Return the acts of a run of some seconds, and what it promises.

    Args:
        source: Source of all choices.
        faults: Names of all faults.
        seconds: From the call; the last act of a long run goes on until then.
        deadline_s: Seconds of an exchange where a site may be lost.
    """
    end, long = time.monotonic() + seconds, seconds >= LONG_S
    first, second = harmless(source, long), alone(source, long)
    found = [act("harmless", first, PATIENT_S), act("one site", second, deadline_s)]
    promise = Promise(
        tuple(step.fault for step in (*first, *second) if step.fault),
        tuple(dict.fromkeys(step.replies for step in (*first, *second) if step.replies)),
    )
    if long:
        some = [name for name in faults if name != PAUSED]
        found.append(Act("pairs", pairs(source, some, end), 12, deadline_s))
        promise = Promise(tuple(faults), tuple(BAD_REPLIES), (*promise.outcomes, RESUMED))
    return found, promise


def act(name: str, steps: list[Step], deadline_s: float) -> Act:
    """Return an act whose study has rounds for all its steps."""
    return Act(name, iter(steps), 1 + sum(step.rounds for step in steps), deadline_s)
