"""Hints for an unknown name: the name that was probably meant."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping, Sequence

from fedsgcg.common.names import spelled
from fedsgcg.common.settings.choices import CLASSES, GROUPS, is_import_path


def nearest(word: str, known: Sequence[str], *, listed: bool = False) -> str:
    """Return a hint such as "did you mean 'x'?", or the known names if none is similar.

    Args:
        word: The unknown name.
        known: The known names.
        listed: Whether the message already lists the known names; then the hint may be empty.
    """
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.5):
        hint = f"did you mean {close[0]!r}?"
        if unicodedata.normalize("NFC", word) == unicodedata.normalize("NFC", close[0]):
            hint += (
                f" It is spelled {spelled(close[0])}, not {spelled(word)}: copy the folder's name."
            )
        return hint
    return "" if listed else f"known: {', '.join(sorted(known)[:30])}"


def wrong_choice(group: str, value: str, choices: Sequence[str]) -> str:
    """Return a hint for a value that is not a choice of its group.

    Args:
        group: The group, e.g. `data`.
        value: The value, e.g. `photos` (a file without its suffix) or `my_lab.Smooth`.
        choices: The choices, which the message lists.
    """
    if hint := nearest(value, choices, listed=True):
        return hint
    module, dot, name = value.rpartition(".")
    if group in CLASSES and dot and is_import_path(f"{module}:{name}"):
        return f"a class has a colon before its name: {group}={module}:{name}"
    return f"your own file: {group}=PATH.yaml, or --config-dir DIR if it is in DIR/{group}/"


def meant(key: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown setting.

    Args:
        key: Its name, e.g. `federation.round` or `lr`.
        known: Names of all settings and sections, e.g. `federation.rounds`.
    """
    # A user who writes `rounds` means `federation.rounds`: the last part identifies a setting.
    # Of several settings with the same last part the one nearest to the top is meant.
    ends: dict[str, str] = {}
    for name in sorted(known, key=lambda one: one.count(".")):
        ends.setdefault(name.rpartition(".")[2], name)
    ends |= {name: name for name in [*known, *GROUPS]}
    if key in ends:
        return f"did you mean {ends[key]!r}?"
    group, _, tail = key.rpartition(".")
    inside = [
        name.removeprefix(f"{group}.") for name in known if group and name.startswith(f"{group}.")
    ]
    if inside:
        return _meant_inside(group, tail, inside, ends)
    similar = [
        name for word in (key, tail) for name in difflib.get_close_matches(word, list(ends), 1, 0.5)
    ]
    close = [ends[name] for name in [*short_for(tail, sorted(ends), whole=True), *similar]]
    return f"did you mean {close[0]!r}?" if close else "see `fedsgcg settings`"


def _meant_inside(group: str, tail: str, inside: Sequence[str], ends: Mapping[str, str]) -> str:
    """Return a hint for an unknown name in a known group.

    Args:
        group: The group.
        tail: The rest of the name.
        inside: Names of the group's settings, without the group.
        ends: Last part of a name -> name, of all settings.
    """
    close = [f"{group}.{name}" for name in short_for(tail, [n for n in inside if "." not in n])]
    if not close and "." in group:
        close = [f"{group}.{name}" for name in inside if name.rpartition(".")[2] == tail]
    if not close and tail in ends:
        close = [ends[tail]]
    if not close:
        close = [f"{group}.{name}" for name in short_for(tail, inside)]
    if not close:
        close = [f"{group}.{name}" for name in difflib.get_close_matches(tail, inside, n=1)]
    return f"did you mean {close[0]!r}?" if close else f"settings of {group}: {', '.join(inside)}"


def short_for(word: str, names: Sequence[str], *, whole: bool = False) -> list[str]:
    """Return the names that a word may abbreviate, the likeliest first.

    In this order: its plural or singular (`round` for `rounds`), a name with these initials (`lr`
    for `learning_rate`), one that has it as a part between underscores (`deadline` for
    `join_deadline_s`), one that starts with it (`temp`), one that contains it.

    Args:
        word: The unknown name.
        names: The known names, without their section.
        whole: Leave out names that only start with it or contain it.
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
