"""Hints for a name that does not exist: the one that was probably meant."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

from common.names import spelled
from common.settings.choices import GROUPS


def nearest(word: str, known: Sequence[str], *, listed: bool = False) -> str:
    """Return a hint such as "did you mean x?" for an unknown word, or the list when nothing is near.

    Args:
        word: What was given.
        known: What there is.
        listed: Whether the message lists what there is already; then there is no hint when nothing is near.
    """
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.5):
        same = unicodedata.normalize("NFC", word) == unicodedata.normalize("NFC", close[0])
        apart = (
            f" It is spelled {spelled(close[0])}, not {spelled(word)}: copy the folder's own name."
            if same
            else ""
        )
        return f"did you mean {close[0]!r}?{apart}"
    return "" if listed else f"known: {', '.join(sorted(known)[:30])}"


def meant(key: str, known: Sequence[str]) -> str:
    """Return a hint for a setting that does not exist.

    Args:
        key: Its name, e.g. `federation.round` or `lr`.
        known: Names of all settings and sections, e.g. `federation.rounds`.
    """
    # A user who writes `rounds` means `federation.rounds`: the last part of a name is a way to call it.
    ends = {name.rpartition(".")[2]: name for name in reversed(known)} | {
        name: name for name in [*known, *GROUPS]
    }
    group, _, tail = key.rpartition(".")
    inside = [
        name.removeprefix(f"{group}.") for name in known if group and name.startswith(f"{group}.")
    ]
    if key in ends:
        return f"did you mean {ends[key]!r}?"
    if inside:
        close = [f"{group}.{name}" for name in short_for(tail, inside)] or [
            ends[tail] for _ in range(tail in ends)
        ]
        close = close or [
            f"{group}.{name}" for name in difflib.get_close_matches(tail, inside, n=1)
        ]
        return (
            f"did you mean {close[0]!r}?" if close else f"settings of {group}: {', '.join(inside)}"
        )
    similar = [
        name for word in (key, tail) for name in difflib.get_close_matches(word, list(ends), 1, 0.5)
    ]
    close = [ends[name] for name in [*short_for(tail, sorted(ends), whole=True), *similar]]
    return f"did you mean {close[0]!r}?" if close else "see `fedsgcg settings`"


def short_for(word: str, names: Sequence[str], *, whole: bool = False) -> list[str]:
    """Return the names that a word may stand for, the likeliest first.

    In this order: its plural or singular (`round` for `rounds`), a name of these initials (`lr` for `learning_rate`),
    one that has it as a whole word (`deadline` for `join_deadline_s`), one that begins with it (`temp`), one that
    contains it.

    Args:
        word: What was given.
        names: The names, without their section.
        whole: Leave out the names that only begin with it or contain it.
    """
    plural = [
        name for name in names if word in (f"{name}s", name.removesuffix("s")) and name != word
    ]
    initials = [
        name
        for name in names
        if "_" in name and "".join(part[:1] for part in name.split("_")) == word
    ]
    words = [name for name in names if "_" in name and word in name.split("_")]
    words.sort(key=lambda name: (name.split("_").index(word), len(name)))
    found = [*plural, *initials, *words]
    if not whole:
        found += sorted(
            (name for name in names if len(word) > 1 and name.startswith(word)), key=len
        )
        found += [name for name in names if len(word) > 2 and word in name]
    return list(dict.fromkeys(found))
