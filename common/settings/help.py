"""Explanations of settings for `fedsgcg settings NAME`, from the docstrings of their classes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedsgcg.common.errors import fail
from fedsgcg.common.settings.base import bounds_of
from fedsgcg.common.settings.choices import CLASSES, GROUPS, PACKAGES, choices_of
from fedsgcg.common.settings.compose import data_defaults, known_settings, own_choices
from fedsgcg.common.settings.hints import meant
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.run import RunSettings
from fedsgcg.common.settings.yaml_file import meanings

UNITS = {"_s": "seconds", "_degrees": "degrees", "_mm": "millimetres"}
UNIT_OF = {
    "data.image_size": "pixels",
    "method.batch_size": "slices",
    "method.ram.bank_size": "images",
}
"""Unit of a setting by its name; `UNITS` by the end of the name."""


@dataclass(frozen=True)
class Described:
    """The explanation of a setting.

    Attributes:
        name: Dotted name.
        meaning: From the docstring.
        kind: Description of its type.
        choices: Allowed values, if these are few.
        unit: Unit of a number, or "".
    """

    name: str
    meaning: str
    kind: str
    choices: tuple[str, ...] = ()
    unit: str = ""


def described() -> dict[str, Described]:
    """Return the explanation of every setting by name; for sections see `sections`."""
    run = dict(_fields(RunSettings, ""))
    return {**dict(_fields(Plan, "")), **run}


def sections() -> dict[str, str]:
    """Return the first line of each section's docstring, by name."""
    found = [*_sections(Plan, ""), *_sections(RunSettings, "")]
    return {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in found}


def explain(name: str, tree: Mapping[str, Any], overrides: typing.Sequence[str] = ()) -> str:
    """Return the explanation of a setting, a section or a group.

    Args:
        name: E.g. `federation.rounds`, `rounds` (if no other setting ends with it), `prototypes` or
            `experiment`.
        tree: Resolved settings, for the values.
        overrides: The command line, for own files.

    Raises:
        FedsgcgError: CFG-001 for an unknown name, with the nearest known one.
    """
    known = described()
    ends = [key for key in known if key.rpartition(".")[2] == name]
    if name in known:
        return _text(known[name], tree)
    if name in GROUPS or name in sections():
        return _section_text(name, tree, overrides)
    if len(ends) == 1:
        return _text(known[ends[0]], tree)
    action = f"one of {', '.join(ends)}" if ends else meant(name, known_settings())
    raise fail(
        "CFG-001", found=f"unknown setting {name!r}", expected="a known setting", action=action
    )


def default_of(name: str, value: Any) -> Any:
    """Return the default of a setting whose resolved value is given.

    They differ only for settings of the data, where the chosen data set has its own value; an own
    data set has the default.
    """
    section, _, rest = name.partition(".")
    if section != "data":
        return value
    found: Any = data_defaults()
    for part in rest.split("."):
        found = found.get(part, "") if isinstance(found, Mapping) else ""
    return value if found == "" else found


def _section_text(name: str, tree: Mapping[str, Any], overrides: typing.Sequence[str]) -> str:
    section = PACKAGES.get(name, name)
    lines = [f"{name}: {sections().get(section, 'a named bundle of settings')}"]
    if name in GROUPS:
        own = " | package.module:Class" if name in CLASSES else ""
        choices = " | ".join(choices_of(name, own_choices(overrides)))
        lines.append(f"  choices  {choices}{own} | PATH.yaml")
    inside = [found for key, found in described().items() if key.startswith(f"{section}.")]
    return "\n\n".join(["\n".join(lines), *(_text(found, tree) for found in inside)])


def _text(found: Described, tree: Mapping[str, Any]) -> str:
    lines = [found.name, f"  meaning  {found.meaning}"]
    if found.unit:
        lines.append(f"  unit     {found.unit}")
    value = _value(found.name, tree)
    default = default_of(found.name, value)
    lines.append(f"  default  {_shown(default)}")
    if value != default:
        lines.append(f"  here     {_shown(value)} with data={tree['data']['name']}")
    lines.append(
        f"  choices  {' | '.join(found.choices)}" if found.choices else f"  value    {found.kind}"
    )
    return "\n".join(lines)


def _value(name: str, tree: Mapping[str, Any]) -> Any:
    value: Any = tree
    for part in name.split("."):
        value = value.get(part, "") if isinstance(value, Mapping) else ""
    return value


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return '""'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_shown(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)


def _fields(cls: type, prefix: str) -> Iterator[tuple[str, Described]]:
    hints, meaning, bounds = typing.get_type_hints(cls), meanings(cls), bounds_of(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _fields(kind, f"{name}.")
        else:
            words = " ".join(meaning.get(field.name, []))
            most = f", at most {bounds[field.name]:.0f}" if field.name in bounds else ""
            yield name, Described(name, words, _kind(kind) + most, _choices(kind), _unit(name))


def _sections(cls: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield prefix + name, kind
            yield from _sections(kind, f"{prefix}{name}.")


def _choices(kind: Any) -> tuple[str, ...]:
    if typing.get_origin(kind) is Literal:
        return tuple(str(item) for item in typing.get_args(kind))
    return ("true", "false") if kind is bool else ()


def _kind(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        return "a list, e.g. [A,B]"
    if origin is dict:
        of_lists = arguments[1] in (list[int], list[str], list[Any])
        return "a map, e.g. {A: [1]}" if of_lists else "a map, e.g. {A: 1}"
    if isinstance(kind, types.UnionType):
        return ""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, "")


def _unit(name: str) -> str:
    return UNIT_OF.get(name) or next(
        (unit for end, unit in UNITS.items() if name.endswith(end)), ""
    )
