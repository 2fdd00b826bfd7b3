"""The axes of a study: methods, ownership of the data, any setting; each combination is a variant.

A value with commas is an axis: `method=source,sgcg`, `federation=pooled,by_site`,
`prototypes.weight=0.01,0.1`; so are Hydra's `choice(...)` and `range(...)`. An experiment lists its
axes under `grid`; the command line takes precedence.
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

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.settings.aggregation import AGGREGATOR_NAMES
from fedsgcg.common.settings.choices import GROUPS, OwnFile, choices_of, is_file, is_import_path
from fedsgcg.common.settings.compose import LITERAL, own_choices
from fedsgcg.common.settings.hints import nearest, wrong_choice
from fedsgcg.common.settings.training import TRAITS

AXES = ("method", "federation", "heldout", "seed")
PLACES = (
    "site.",
    "ray.",
    "output",
    "shard",
    "config_dir",
    "run",
    "runtime",
    "device",
    "data.root",
    "data.sites",
    "observers",
    "unlabelled",
    "experiment",
)
"""Settings that cannot be an axis: they do not change the result, or they change the data."""


@dataclass(frozen=True)
class Variant:
    """One combination of the axes of a study.

    Attributes:
        label: Name in tables.
        method: Choice of the group `method`.
        federation: Choice of the group `federation`.
        settings: Swept settings as `name=value`.
        traits: Traits of the method, which determine the settings that it reads.
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
    """Separate the axes of a command line from its other settings: (values by axis, the rest).

    A sweep is written as in Hydra: `1,2`, `choice(1,2)`, `range(1,3)`; for methods and federations
    also `glob(ram*)`.

    Raises:
        FedsgcgError: CFG-001 for every setting given twice, every unknown choice, and every setting
            that cannot vary.
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
            action = f"give all values at once: {key}=A,B"
            problems.append(
                Problem("CFG-001", where=key, found=found, expected="one value", action=action)
            )
        if key.startswith(PLACES):
            expected = "one value: this setting does not decide the outcome"
            action = f"write a list in brackets: {key}=[{value}]"
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
        given: Settings that the command line fixes; they replace axes of the experiment.
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

    A setting that a method does not read gives no variants of that method: a sweep over the
    prototypes contains the supervised baseline once, and a sweep over amplitude sharing contains a
    pooled run, which has all domains, once.

    Args:
        axes: Values by axis.
        method: The method if `method` is not an axis.
        federation: The federation if `federation` is not an axis.
        traits: Choice of the group `method` -> its traits (`common.settings.training.TRAITS`).
    """
    swept = {name: values for name, values in axes.items() if name not in AXES}
    federations = list(axes.get("federation") or [federation])
    short = _short_names(list(swept))
    methods = list(axes.get("method") or [method])
    labels = _choice_labels(methods) | _choice_labels(federations)
    found: dict[Variant, None] = {}
    for name, owner in itertools.product(methods, federations):
        own_traits = frozenset(traits.get(name, ()))
        read = [key for key in swept if _reads(name, own_traits, owner, key)]
        for combination in itertools.product(*(swept[key] for key in read)):
            pairs = list(zip(read, combination, strict=True))
            parts = [labels[name]]
            if len(federations) > 1:
                parts.append(labels[owner])
            parts += [f"{short[key]}={value}" for key, value in pairs]
            settings = tuple(f"{key}={value}" for key, value in pairs)
            found[Variant(" ".join(parts), name, owner, settings, own_traits)] = None
    return list(found)


def split_select(overrides: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Separate `select=NAME,NAME` from a command line: (the rest, the names or None)."""
    given = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == "select"]
    rest = [text for text in overrides if text.partition("=")[0] != "select"]
    if not given:
        return rest, None
    return rest, [name for text in given for name in _split_names(text.strip("[]")) if name]


def split_selected(
    axes: Mapping[str, list[str]], names: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Split the axes of a study into those that are compared and those chosen in each fold.

    Raises:
        FedsgcgError: CFG-001 for every name in `select` that is not a swept setting.
    """
    known = [name for name in axes if name not in AXES]
    problems = [
        Problem(
            "CFG-001",
            where="select",
            found=name,
            expected="a setting with several values, e.g. prototypes.weight=0.01,0.1 "
            "select=prototypes.weight",
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
    """Return every combination of the selected settings that a variant's method reads."""
    read = [
        name
        for name in selected
        if _reads(variant.method, variant.traits, variant.federation, name)
    ]
    if not read:
        return []
    combinations = itertools.product(*(selected[name] for name in read))
    return [
        tuple(f"{name}={value}" for name, value in zip(read, values, strict=True))
        for values in combinations
    ]


def _reads(method: str, traits: Collection[str], federation: str, key: str) -> bool:
    section = key.split(".")[1] if key.startswith("method.") else ""
    if section in TRAITS and section != "ram" and method in TRAITS:
        return section == method  # a method's own settings
    if key.startswith("prototypes."):
        return "contrasts" in traits
    if key == "method.ram.sharing" and federation != "by_site":
        return False  # there are no other sites to share with
    if key.startswith("method.segclr."):
        return "pairs" in traits
    section, _, name = key.partition(".")
    merges = section == "federation" and name.partition(".")[0] in ("aggregator", *AGGREGATOR_NAMES)
    if merges and federation != "by_site":
        return False  # there is one model
    return "mixes" in traits or not key.startswith("method.ram.")


def _choice_labels(choices: Sequence[str]) -> dict[str, str]:
    """Return a label for each choice: a file's stem, a class's name, or all of it if ambiguous."""
    short = {choice: _choice_label(choice) for choice in choices}
    ends = Counter(short.values())
    return {choice: label if ends[label] == 1 else choice for choice, label in short.items()}


def _choice_label(choice: str) -> str:
    if is_file(choice):
        return Path(choice).stem
    return choice.rpartition(":")[2] if is_import_path(choice) else choice


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each name, or the full name if two names have the same last part."""
    ends = {key: key.rpartition(".")[2] for key in keys}
    counts = Counter(ends.values())
    return {key: end if counts[end] == 1 else key for key, end in ends.items()}


def _unknown_choices(
    values: Mapping[str, Sequence[str]], own: Sequence[OwnFile]
) -> Iterator[Problem]:
    for group in ("method", "federation"):
        known = choices_of(group, own)
        for name in values.get(group, []):
            own_class = group == "method" and is_import_path(name)
            if not (name in known or is_file(name) or own_class):
                yield Problem(
                    "CFG-001",
                    where=group,
                    found=name,
                    expected=" | ".join(known),
                    action=wrong_choice(group, name, known),
                )


def _values_of(text: str, own: Sequence[OwnFile]) -> list[str] | None:
    """Return the values of an override that may be an axis, in command-line syntax, else None.

    Raises:
        FedsgcgError: CFG-001 for a sweep without a finite list of values.
    """
    key, separator, value = text.partition("=")
    if key == "heldout":  # names of sites are taken literally
        if choice := re.fullmatch(r"choice\((.*)\)", value):
            value = choice[1]
        return _split_names(value.strip("[]"))
    if not separator or key in LITERAL or text.startswith(("+", "~")):
        return None
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return None  # composing the settings reports the error
    found: Any = override.value()
    if not override.is_sweep_override():
        if key not in AXES:
            return None
        return [str(item) for item in (found if isinstance(found, list) else [found])]
    if isinstance(found, Glob) and key in GROUPS:
        return found.filter(choices_of(key, own))
    if not override.is_discrete_sweep() or isinstance(found, Glob):
        expected = "a list of values"
        action = f"write {key}=A,B or choice(A,B) or range(START,STOP,STEP)"
        raise fail("CFG-001", where=key, found=text, expected=expected, action=action)
    items: list[Any] = list(override.sweep_iterator())
    if isinstance(found, RangeSweep):
        items = [_rounded(item) for item in items]
    return [str(item) if key in AXES else _spelled(item) for item in items]


def _rounded(number: float) -> float:
    """Remove the rounding error of a number of a range: `0.1 + 2 * 0.1` is 0.30000000000000004."""
    return float(f"{number:.12g}") if isinstance(number, float) else number


def _split_names(value: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes."""
    items = []
    depth = 0
    quote = ""
    start = 0
    for position, letter in enumerate(value):
        if quote:
            if letter == quote:
                quote = ""
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
    """Return a value in command-line syntax."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return value if _reads_as_itself(value) else f'"{quoted}"'
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_spelled(item) for item in value) + "]"
    if isinstance(value, dict):
        items = [f"{_spelled(name)}:{_spelled(item)}" for name, item in value.items()]
        return "{" + ",".join(items) + "}"
    return str(value)


def _reads_as_itself(text: str) -> bool:
    """Return whether Hydra parses an unquoted text as the same text; not for `true`, `1`, `a,b`."""
    try:
        return bool(OverridesParser.create().parse_override(f"x={text}").value() == text)
    except HydraException:
        return False
