"""What a study varies: methods, who owns the data, any setting; each combination is a variant with a label of its own.

A value with commas is an axis: `method=source,sgcg`, `federation=pooled,by_site`, `prototypes.weight=0.01,0.1`; so are
Hydra's `choice(...)` and `range(...)`. An experiment names its axes under `grid`; the command line beats it.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, RangeSweep
from hydra.errors import HydraException

from common.errors import FedsgcgError, Problem, fail
from common.settings.choices import GROUPS, OwnFile, choices_of, is_file, is_import_path
from common.settings.compose import LITERAL, own_choices
from common.settings.hints import nearest
from common.settings.training import TRAITS

AXES = ("method", "federation", "heldout", "seed")
PLACES = (
    "site.",
    "ray.",
    "output",
    "config_dir",
    "run",
    "runtime",
    "device",
    "data.root",
    "data.sites",
    "observers",
    "experiment",
)
"""Settings that do not make another result, or another hospital: nothing to compare."""


@dataclass(frozen=True)
class Variant:
    """One of the things that a study compares.

    Attributes:
        label: What tables call it.
        method: Choice of the group `method`.
        federation: Choice of the group `federation`.
        settings: Swept settings as `name=value`.
        traits: What the method does, which says what settings it reads.
    """

    label: str
    method: str
    federation: str
    settings: tuple[str, ...]
    traits: frozenset[str] = frozenset()

    @property
    def overrides(self) -> list[str]:
        """The variant as settings of a command line."""
        return [f"method={self.method}", f"federation={self.federation}", *self.settings]


def split_axes(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take the axes off a command line: (values by axis, the rest).

    A sweep is written as in Hydra: `1,2`, `choice(1,2)`, `range(1,3)`; of methods and federations also `glob(ram*)`.

    Raises:
        FedsgcgError: CFG-001 with every setting given twice, every unknown choice, and every setting that cannot vary.
    """
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    problems: list[Problem] = []
    own = own_choices([text for text in overrides if text.startswith("config_dir=")])
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            items = _values_of(text, own)
        except FedsgcgError as error:
            problems += error.problems
            continue
        if items is None or (key not in AXES and len(items) < 2):
            rest.append(text if items is None else f"{key}={items[0]}")
            continue
        if key in values:
            found = f"{key}={','.join(values[key])} and {text}"
            action = f"put the values in one: {key}=A,B"
            problems.append(
                Problem("CFG-001", where=key, found=found, expected="one value", action=action)
            )
        if key.startswith(PLACES):
            expected = "a setting that decides the outcome"
            action = f"a list goes in brackets: {key}=[{value}]"
            problems.append(
                Problem(
                    "CFG-001",
                    where=key,
                    found=f"several values, {value}",
                    expected=expected,
                    action=action,
                )
            )
        values[key] = [item for item in dict.fromkeys(items) if item or key == "heldout"]
    problems += _unknown_choices(values, own)
    if problems:
        raise FedsgcgError(*problems)
    return values, rest


def with_grid(
    values: Mapping[str, list[str]],
    grid: Mapping[str, Sequence[Any]],
    given: Sequence[str],
) -> dict[str, list[str]]:
    """Join the axes of the command line with those of an experiment.

    Args:
        values: Axes of the command line.
        grid: `grid` of the experiment: setting -> values.
        given: Settings that the command line fixes; they are no axis any more.
    """
    fixed = {text.partition("=")[0] for text in given}
    axes = {
        name: [_spelled(item) for item in items]
        for name, items in grid.items()
        if name not in fixed
    }
    joined = {**axes, **values}
    if problems := list(_unknown_choices(joined, own_choices(given))):
        raise FedsgcgError(*problems)
    return joined


def variants(
    axes: Mapping[str, Sequence[str]],
    method: str,
    federation: str,
    traits: Mapping[str, Collection[str]] = TRAITS,
) -> list[Variant]:
    """Return every combination of methods, federations and swept settings.

    A setting that a method does not read makes no variants of it: the supervised baseline stands once in a sweep over
    the prototypes, and a pooled run, which has all domains, once in one over what hospitals share of their amplitudes.

    Args:
        axes: Values by axis.
        method: The method where `method` is no axis.
        federation: Likewise.
        traits: Choice of the group `method` -> what it does (`common.settings.training.TRAITS`).
    """
    swept = {name: values for name, values in axes.items() if name not in AXES}
    federations = list(axes.get("federation") or [federation])
    short = _short_names(list(swept))
    methods = list(axes.get("method") or [method])
    labels = _choice_labels(methods) | _choice_labels(federations)
    found: dict[Variant, None] = {}
    for name, owner in itertools.product(methods, federations):
        does = frozenset(traits.get(name, ()))
        read = [key for key in swept if _reads(does, owner, key)]
        for combination in itertools.product(*(swept[key] for key in read)):
            settings = tuple(f"{key}={value}" for key, value in zip(read, combination, strict=True))
            words = [labels[name], *([labels[owner]] if len(federations) > 1 else [])]
            words += [f"{short[key]}={value}" for key, value in zip(read, combination, strict=True)]
            found[Variant(" ".join(words), name, owner, settings, does)] = None
    return list(found)


def split_select(overrides: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Take `select=NAME,NAME` off a command line: (the rest, the names); None where it is not given."""
    given = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == "select"]
    rest = [text for text in overrides if text.partition("=")[0] != "select"]
    if not given:
        return rest, None
    return rest, [name for text in given for name in _split_names(text.strip("[]")) if name]


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
    read = [name for name in selected if _reads(variant.traits, variant.federation, name)]
    if not read:
        return []
    combinations = itertools.product(*(selected[name] for name in read))
    return [
        tuple(f"{name}={value}" for name, value in zip(read, values, strict=True))
        for values in combinations
    ]


def folder_name(label: str) -> str:
    """Return the folder of a label: commas for blanks, nothing that a path cannot hold."""
    return label.replace(" ", ",").replace("/", "-")


def _reads(traits: Collection[str], federation: str, key: str) -> bool:
    if key.startswith("prototypes."):
        return "contrasts" in traits
    if key == "method.ram.sharing" and federation != "by_site":
        return False  # there are no other sites to share with
    return "mixes" in traits if key.startswith("method.ram.") else True


def _choice_labels(choices: Sequence[str]) -> dict[str, str]:
    """What tables call choices: a file by its stem, a class by its name, the whole where two would be called alike."""
    short = {choice: _choice_label(choice) for choice in choices}
    ends = Counter(short.values())
    return {choice: label if ends[label] == 1 else choice for choice, label in short.items()}


def _choice_label(choice: str) -> str:
    if is_file(choice):
        return Path(choice).stem
    return choice.rpartition(":")[2] if is_import_path(choice) else choice


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Last part of each name, the whole where two end alike."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}


def _unknown_choices(
    values: Mapping[str, Sequence[str]], own: Sequence[OwnFile]
) -> Iterator[Problem]:
    for group in ("method", "federation"):
        known = choices_of(group, own)
        for name in values.get(group, []):
            if not (name in known or is_file(name) or (group == "method" and is_import_path(name))):
                yield Problem(
                    "CFG-001",
                    where=group,
                    found=name,
                    expected=" | ".join(known),
                    action=nearest(name, known, listed=True),
                )


def _values_of(text: str, own: Sequence[OwnFile]) -> list[str] | None:
    """Return the values of an override that may be an axis, as a command line spells them; None for anything else.

    Raises:
        FedsgcgError: CFG-001 for a sweep that has no list of values.
    """
    key, separator, value = text.partition("=")
    if key == "heldout":  # names of hospitals are meant to the letter
        inside = re.fullmatch(r"choice\((.*)\)", value)
        return _split_names((inside[1] if inside else value).strip("[]"))
    if not separator or key in LITERAL or text.startswith(("+", "~")):
        return None
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return None  # what cannot be read is named when the settings are composed
    found: Any = override.value()
    if not override.is_sweep_override():
        if key not in AXES:
            return None
        return [str(item) for item in (found if isinstance(found, list) else [found])]
    if isinstance(found, Glob) and key in GROUPS:
        return found.filter(choices_of(key, own))
    if not override.is_discrete_sweep() or isinstance(found, Glob):
        expected, action = (
            "values that can be listed",
            f"{key}=A,B or choice(A,B) or range(START,STOP,STEP)",
        )
        raise fail("CFG-001", where=key, found=text, expected=expected, action=action)
    items: list[Any] = list(override.sweep_iterator())
    if isinstance(found, RangeSweep):
        items = [_tidy(item) for item in items]
    return [str(item) if key in AXES else _spelled(item) for item in items]


def _tidy(number: float) -> float:
    """Take the rounding error off a number of a range: `0.1 + 2 * 0.1` is 0.30000000000000004."""
    return float(f"{number:.12g}") if isinstance(number, float) else number


def _split_names(value: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes."""
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


def _spelled(value: Any) -> str:
    """A value as the command line spells it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return value if _reads_as_itself(value) else f'"{quoted}"'
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_spelled(item) for item in value) + "]"
    if isinstance(value, dict):
        return (
            "{"
            + ",".join(f"{_spelled(name)}:{_spelled(item)}" for name, item in value.items())
            + "}"
        )
    return str(value)


def _reads_as_itself(text: str) -> bool:
    """Whether Hydra reads a text without quotes as this text: not `true`, `1` or `a,b`."""
    try:
        return bool(OverridesParser.create().parse_override(f"x={text}").value() == text)
    except HydraException:
        return False
