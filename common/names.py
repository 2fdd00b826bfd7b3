"""Names that are not valid UTF-8 or differ only in Unicode form or case, and text of sites."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Final

SHOWN: Final = 64
"""Most characters of another party's text that are shown or kept."""

MAX_CLASSES: Final = 256
"""Most classes or structures; a class index is stored in one byte."""


def printable(text: str) -> str:
    """Return a name that can be printed and encoded as UTF-8.

    Python represents the invalid bytes of a file name (from an old Windows share, for example) by
    lone surrogates, which cannot be encoded. Each is replaced by its byte in hex: `M%FCller`.
    """
    if text.isascii():
        return text
    return "".join(
        f"%{ord(char) - 0xDC00:02X}" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text
    )


def site_text(text: object) -> str:
    """Return text that a site sent as at most `SHOWN` printable ASCII characters, "" for no text.

    Everything else is dropped, so that it can neither forge lines of a log, control a terminal,
    mark up a page nor fill a file. This is the only way for a site's text into messages, events and
    files of the coordinator.
    """
    if not isinstance(text, str):
        return ""
    kept = "".join(char for char in text[: 16 * SHOWN] if " " <= char <= "~")
    return kept[:SHOWN]


def is_site_text(text: object) -> bool:
    """Whether text is one or more characters, all of which `site_text` keeps."""
    return isinstance(text, str) and bool(text) and site_text(text) == text


def number_of(count: int, noun: str) -> str:
    """Return `1 cell` or `2 cells`; the noun is regular."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of names that differ only in Unicode form or case, sorted.

    macOS writes an umlaut as two characters, other systems as one, so that two folders may look the
    same and yet be read as two hospitals.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        groups[folded(name)].add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def folded(name: str) -> str:
    """Return a name without differences of Unicode form, case and surrounding spaces."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()


def spelled(name: str) -> str:
    """Return a name with its non-ASCII characters as codes, which tells lookalikes apart."""
    return "".join(char if char.isascii() else f"\\u{ord(char):04x}" for char in name)
