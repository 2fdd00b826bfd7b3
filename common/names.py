"""Names as people read them: bytes that are no UTF-8 made visible, and names that only look different to a computer."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable


def printable(text: str) -> str:
    """Return a name that can be shown and written as UTF-8.

    A file name is bytes; those that are no UTF-8 (an old Windows share, an archive of one) reach Python as lone
    surrogates, which no console and no UTF-8 file takes. Each becomes its byte in hex, `M%FCller`. The file itself
    keeps its name.
    """
    if text.isascii():
        return text
    return "".join(
        f"%{ord(char) - 0xDC00:02X}" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text
    )


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of different names that are equal in another Unicode form or without upper case, sorted.

    The umlaut of a Mac's file name is two characters where other systems have one: two folders look the same and are
    two hospitals.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        groups[folded(name)].add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def folded(name: str) -> str:
    """Return what is left of a name when Unicode form, case and surrounding blanks do not count."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()


def spelled(name: str) -> str:
    """Return a name with every character outside ASCII as its code, so that names that look the same differ."""
    return "".join(char if char.isascii() else f"\\u{ord(char):04x}" for char in name)
