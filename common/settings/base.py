"""The base class of all settings: a frozen dataclass that reports all its errors at once."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from fedsgcg.common.errors import FedsgcgError, Problem

Checks = Iterator[tuple[bool, str, str]]


class Section:
    """Base class of settings: a frozen dataclass whose `checks` run when an instance is made.

    Every check that fails becomes a `Problem`, so that all errors of a configuration are reported
    at once.
    """

    def checks(self) -> Checks:
        """Yield (whether it holds, field name, expected value) for every rule of this section."""
        yield from ()

    def __post_init__(self) -> None:
        wrong = [
            Problem("CFG-001", where=name, found=repr(attrgetter(name)(self)), expected=expected)
            for holds, name, expected in self.checks()
            if not holds
        ]
        if wrong:
            raise FedsgcgError(*wrong)
