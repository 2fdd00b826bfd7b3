"""Builds typed settings from plain dictionaries, with all problems in one error."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.settings.hints import nearest

T = TypeVar("T")


def build(cls: type[T], tree: Mapping[str, Any]) -> T:
    """Build a settings dataclass from plain dictionaries.

    Raises:
        FedsgcgError: CFG-001 with every problem.
    """
    problems: list[Problem] = []
    value = _convert(cls, tree, "", problems)
    if problems:
        raise FedsgcgError(*problems)
    return cast("T", value)


def _convert(kind: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    """Convert `value` to the annotation `kind`; on failure add a problem and return None."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_section(kind, value, path, problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal and value in arguments:
        return arguments[arguments.index(value)]
    if origin in (typing.Union, types.UnionType) and type(value) in arguments:
        return value
    if origin is list and isinstance(value, (list, tuple)):
        return [
            _convert(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)
        ]
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(
            _convert(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)
        )
    if origin is dict and isinstance(value, Mapping):
        return {
            str(key): _convert(arguments[1], item, f"{path}.{key}", problems)
            for key, item in value.items()
        }
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)  # e.g. a hospital named 12; numbers of `yaml_file` keep their notation
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    expected = _list_of(arguments[0]) if origin in (list, tuple) else _type_name(origin or kind)
    if origin is Literal:
        expected = " | ".join(str(item) for item in arguments)
    unquoted = kind is str and (value is None or isinstance(value, bool))
    action = "write it in quotes" if unquoted else ""
    problems.append(
        Problem("CFG-001", where=path, found=_as_yaml(value), expected=expected, action=action)
    )
    return None


def _as_yaml(value: Any) -> str:
    """Return a value in the notation of YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _list_of(kind: Any) -> str:
    """Return the name of a list, with an example of its items' type."""
    return f"a list such as {'[1]' if kind in (int, float) else '[A,B]'}"


def _type_name(kind: Any) -> str:
    """Return the name of a type for someone who does not program."""
    names: dict[Any, str] = {
        types.UnionType: "true, false, a number or text",
        dict: "names and values such as {A: 1}",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }
    return names.get(kind, str(kind))


def _convert_section(kind: type, value: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(
            Problem("CFG-001", where=path, found=repr(value), expected=_type_name(dict))
        )
        return None
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in value:
        if name not in names:
            problems.append(
                Problem(
                    "CFG-001",
                    where=path or kind.__name__,
                    found=f"unknown setting {name!r}",
                    action=nearest(name, names),
                )
            )
    required = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is f.default_factory is dataclasses.MISSING
    }
    for name in sorted(required - set(value)):
        problems.append(
            Problem(
                "CFG-001", where=f"{path}.{name}".lstrip("."), found="nothing", expected="a value"
            )
        )
    converted = {}
    for name in (name for name in value if name in names):
        faults = len(problems)
        item = _convert(hints[name], value[name], f"{path}.{name}".lstrip("."), problems)
        if len(problems) == faults:
            converted[name] = item
    if required - set(converted):
        return None
    # Defaults replace the values that were refused, so that the rules of the others are checked
    # too.
    try:
        return kind(**converted)
    except FedsgcgError as error:
        problems.extend(
            dataclasses.replace(p, where=f"{path}.{p.where}".lstrip(".")) for p in error.problems
        )
        return None
