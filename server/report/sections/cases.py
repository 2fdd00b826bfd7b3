"""The report's text on cases: usable, left out and flagged ones, as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsgcg.common.errors import CODES

ROLES = {
    "train": "training",
    "unlabelled": "without labels",
    "heldout": "held out",
    "observer": "observer",
}


def join_words(words: Iterable[Any]) -> str:
    """Return "a, b and c"."""
    parts = [str(word) for word in words]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, e.g. "1 case", "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def case_lines(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the cases of each hospital, with the reasons for those that were left out.

    Args:
        outcomes: Contents of the cells' `outcome.json`.

    Returns:
        One line per hospital, or one for each of its roles if they differ between folds.
    """
    # site -> ordered set of (role, text)
    found: dict[str, dict[tuple[str, str], None]] = {}
    for site, facts in _censuses(outcomes):
        found.setdefault(site, {})[str(facts.get("role", "")), _case_text(facts)] = None
    lines = []
    for site, entries in sorted(found.items()):
        texts = list(dict.fromkeys(text for _, text in entries))
        if len(texts) == 1:
            lines.append(f"{site}: {texts[0]}")
            continue
        ordered = sorted(
            entries,
            key=lambda entry: list(ROLES).index(entry[0]) if entry[0] in ROLES else len(ROLES),
        )
        lines += [f"{site} ({ROLES.get(role, role)}): {text}" for role, text in ordered]
    return lines


def left_out_sentence(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """State how many cases were left out and where, "" if none was.

    A case counts once, even if several runs report it.
    """
    found: dict[str, int] = {}
    for site, facts in _censuses(outcomes):
        found[site] = max(found.get(site, 0), sum(_counts(facts, "left_out").values()))
    sites = [site for site, number in sorted(found.items()) if number]
    number = sum(found.values())
    if not sites:
        return ""
    verb = "was" if number == 1 else "were"
    return f"{count_of(number, 'case')} {verb} left out at {join_words(sites)}."


def _censuses(outcomes: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Every (site, census) of every run."""
    for outcome in outcomes:
        yield from _mapping(outcome, "sites").items()


def _case_text(facts: Mapping[str, Any]) -> str:
    left_out, flagged = _counts(facts, "left_out"), _counts(facts, "flagged")
    text = count_of(sum(_counts(facts, "cases").values()), "usable case")
    if left_out:
        text += f", {sum(left_out.values())} left out ({_reasons(left_out)})"
    if flagged:
        empty = flagged.get("DAT-110", 0)
        others = {code: number for code, number in flagged.items() if code != "DAT-110"}
        parts = [f"{empty} with an empty mask"] if empty else []
        parts += [f"{sum(others.values())} with a remark ({_reasons(others)})"] if others else []
        text += f"; {', '.join(parts)}"
    few = facts.get("suppressed")
    if isinstance(few, list) and few:
        text += f"; fewer than the hospital's floor: {join_words(few)}"
    return text


def _counts(facts: Mapping[str, Any], name: str) -> Mapping[str, int]:
    return {
        str(key): value for key, value in _mapping(facts, name).items() if isinstance(value, int)
    }


def _reasons(counts: Mapping[str, int]) -> str:
    return "; ".join(
        f"{number} × {code} {CODES.get(code, '')}".rstrip(" .") for code, number in counts.items()
    )


def _mapping(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = tree.get(name)
    return part if isinstance(part, dict) else {}
