"""The base of all settings: a frozen dataclass that names everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from common.errors import FedsgcgError, Problem

Checks = Iterator[tuple[bool, str, str]]


class Section:
    """Base of all settings: a frozen dataclass whose `checks` are run when it is made.

    `checks` yields (holds, field, what was expected) and every failing one becomes a Problem, so that a reader sees all
    errors of a configuration at once.
    """

    def checks(self) -> Checks:
        """Yield (holds, field name, expectation) for every rule of this section."""
        yield from ()

    def __post_init__(self) -> None:
        wrong = [
            Problem("CFG-001", where=name, found=repr(attrgetter(name)(self)), expected=expected)
            for holds, name, expected in self.checks()
            if not holds
        ]
        if wrong:
            raise FedsgcgError(*wrong)
