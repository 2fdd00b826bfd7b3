"""The base class of all settings: a frozen dataclass that reports all its errors at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from operator import attrgetter
from typing import Any, Final

from fedsgcg.common.errors import FedsgcgError, Problem

Checks = Iterator[tuple[bool, str, str]]
MOST: Final = "most"
"""Key of a field's metadata: the largest value of a setting that costs disk, memory or time."""


def at_most(most: float, default: Any) -> Any:
    """Return a dataclass field with an upper bound.

    Args:
        most: Largest value; for a tuple or a mapping, the largest number of entries.
        default: Default value.
    """
    return field(default=default, metadata={MOST: most})


def bounds_of(cls: type) -> dict[str, float]:
    """Return field -> upper bound of a section's settings that have one."""
    if not is_dataclass(cls):
        return {}
    return {each.name: each.metadata[MOST] for each in fields(cls) if MOST in each.metadata}


class Section:
    """Base class of settings: a frozen dataclass whose `checks` run when an instance is made.

    Every check that fails becomes a `Problem`, so that all errors of a configuration are reported
    at once.
    """

    def checks(self) -> Checks:
        """Yield (whether it holds, field name, expected value) for every rule of this section."""
        yield from ()

    def _upper_bounds(self) -> Checks:
        for name, most in bounds_of(type(self)).items():
            value = getattr(self, name)
            entries = isinstance(value, (tuple, list, dict))
            unit = " entries" if entries else ""
            yield (len(value) if entries else value) <= most, name, f"at most {most:.0f}{unit}"

    def __post_init__(self) -> None:
        wrong = [
            Problem("CFG-001", where=name, found=repr(attrgetter(name)(self)), expected=expected)
            for holds, name, expected in (*self.checks(), *self._upper_bounds())
            if not holds
        ]
        if wrong:
            raise FedsgcgError(*wrong)


def block_checks(blocks: tuple[int, ...]) -> Checks:
    """Yield whether a setting `blocks` has some of the encoder's blocks 1 to 5, each once."""
    known = all(1 <= block <= 5 for block in blocks)
    distinct = len(set(blocks)) == len(blocks)
    yield bool(blocks) and known and distinct, "blocks", "numbers from 1 to 5, each once"
