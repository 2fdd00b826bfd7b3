"""What a study varies: methods, who owns the data, any setting; each combination is a variant with a label of its own.

A value with commas is an axis: `method=source,sgcg`, `federation=pooled,by_site`, `prototypes.weight=0.01,0.1`. An
experiment names its axes under `grid`; the command line beats it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import FedsgcgError, Problem
from common.plan import CONTRASTIVE, MIXING
from common.settings import LITERAL, choices_of, nearest

AXES = ("method", "federation", "heldout", "seed")
PLACES = ("site.", "ray.", "output", "run", "runtime", "device", "data.root", "data.sites", "observers", "experiment")
"""Settings that do not make another result, or another hospital: nothing to compare."""


@dataclass(frozen=True)
class Variant:
    """One of the things that a study compares.

    Attributes:
        label: What tables call it.
        method: Choice of the group `method`.
        federation: Choice of the group `federation`.
        settings: Swept settings as `name=value`.
    """

    label: str
    method: str
    federation: str
    settings: tuple[str, ...]

    @property
    def overrides(self) -> list[str]:
        """The variant as settings of a command line."""
        return [f"method={self.method}", f"federation={self.federation}", *self.settings]


def split_axes(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take the axes off a command line: (values by axis, the rest).

    Raises:
        FedsgcgError: CFG-001 with every setting given twice, every unknown choice, and every setting that cannot vary.
    """
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    problems: list[Problem] = []
    for text in overrides:
        key, separator, value = text.partition("=")
        # A hospital's name and a folder are meant to the letter, but several hospitals are a list.
        items = [] if key in LITERAL and key != "heldout" else _items(value.strip("[]") if key in AXES else value)
        if not separator or (key not in AXES and len(items) < 2):
            rest.append(text)
            continue
        if key in values:
            found = f"{key}={','.join(values[key])} and {text}"
            action = f"put the values in one: {key}=A,B"
            problems.append(Problem("CFG-001", where=key, found=found, expected="one value", action=action))
        if key.startswith(PLACES):
            expected = "a setting that decides the outcome"
            action = f"a list goes in brackets: {key}=[{value}]"
            problems.append(
                Problem("CFG-001", where=key, found=f"several values, {value}", expected=expected, action=action)
            )
        values[key] = [item for item in dict.fromkeys(items) if item or key == "heldout"]
    problems += _unknown_choices(values)
    if problems:
        raise FedsgcgError(*problems)
    return values, rest


def with_grid(
    values: Mapping[str, list[str]], grid: Mapping[str, Sequence[Any]], given: Sequence[str]
) -> dict[str, list[str]]:
    """Join the axes of the command line with those of an experiment.

    Args:
        values: Axes of the command line.
        grid: `grid` of the experiment: setting -> values.
        given: Settings that the command line fixes; they are no axis any more.
    """
    fixed = {text.partition("=")[0] for text in given}
    axes = {name: [_text(item) for item in items] for name, items in grid.items() if name not in fixed}
    joined = {**axes, **values}
    if problems := list(_unknown_choices(joined)):
        raise FedsgcgError(*problems)
    return joined


def variants(axes: Mapping[str, Sequence[str]], method: str, federation: str) -> list[Variant]:
    """Return every combination of methods, federations and swept settings.

    A setting that a method does not read makes no variants of it: the supervised baseline stands once in a sweep over
    the prototypes, and a pooled run, which has all domains, once in one over what hospitals share of their amplitudes.

    Args:
        axes: Values by axis.
        method: The method where `method` is no axis.
        federation: Likewise.
    """
    swept = {name: values for name, values in axes.items() if name not in AXES}
    federations = list(axes.get("federation") or [federation])
    short = _short_names(list(swept))
    found: dict[Variant, None] = {}
    for name, owner in itertools.product(axes.get("method") or [method], federations):
        read = [key for key in swept if _reads(name, owner, key)]
        for combination in itertools.product(*(swept[key] for key in read)):
            settings = tuple(f"{key}={value}" for key, value in zip(read, combination, strict=True))
            words = [name, *([owner] if len(federations) > 1 else [])]
            words += [f"{short[key]}={value}" for key, value in zip(read, combination, strict=True)]
            found[Variant(" ".join(words), name, owner, settings)] = None
    return list(found)


def split_select(overrides: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Take `select=NAME,NAME` off a command line: (the rest, the names); None where it is not given."""
    given = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == "select"]
    rest = [text for text in overrides if text.partition("=")[0] != "select"]
    if not given:
        return rest, None
    return rest, [name for text in given for name in _items(text.strip("[]")) if name]


def split_selected(
    axes: Mapping[str, list[str]], names: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Split the axes of a study: (those that are compared, those that are chosen inside each fold).

    Raises:
        FedsgcgError: CFG-001 with every name of `select` that is no swept setting.
    """
    known = [name for name in axes if name not in AXES]
    problems = [
        Problem(
            "CFG-001",
            where="select",
            found=name,
            expected="a setting with several values, e.g. prototypes.weight=0.01,0.1 select=prototypes.weight",
            action=nearest(name, known),
        )
        for name in names
        if name not in known
    ]
    if problems:
        raise FedsgcgError(*problems)
    compared = {name: values for name, values in axes.items() if name not in names}
    return compared, {name: axes[name] for name in names}


def candidates_of(variant: Variant, selected: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Return every combination of selected settings that a variant's method reads; none where it reads none."""
    read = [name for name in selected if _reads(variant.method, variant.federation, name)]
    if not read:
        return []
    combinations = itertools.product(*(selected[name] for name in read))
    return [tuple(f"{name}={value}" for name, value in zip(read, values, strict=True)) for values in combinations]


def folder_name(label: str) -> str:
    """Return the folder of a label: commas for blanks, nothing that a path cannot hold."""
    return label.replace(" ", ",").replace("/", "-")


def _reads(method: str, federation: str, key: str) -> bool:
    if key.startswith("prototypes."):
        return method in CONTRASTIVE
    if key == "method.ram.sharing" and federation != "by_site":
        return False  # there are no other sites to share with
    return method in MIXING if key.startswith("method.ram.") else True


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Last part of each name, the whole where two end alike."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}


def _unknown_choices(values: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    for group in ("method", "federation"):
        known = choices_of(group)
        for name in values.get(group, []):
            if name not in known:
                yield Problem(
                    "CFG-001",
                    where=group,
                    found=name,
                    expected=" | ".join(known),
                    action=nearest(name, known, listed=True),
                )


def _items(value: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes; an axis in brackets as a whole is one too."""
    depth, quote, start, items = 0, "", 0, []
    for position, letter in enumerate(value):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            items.append(value[start:position])
            start = position + 1
    return [item.strip() for item in [*items, value[start:]]]


def _text(value: Any) -> str:
    """A value of YAML as the command line spells it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(item) for item in value) + "]"
    return str(value)
