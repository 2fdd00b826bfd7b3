"""YAML files that a person fills in, read into a typed section with all problems in one error."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.settings.compose import build

T = TypeVar("T")
MOST_BYTES: Final = 2**20
"""Bytes of a file that a person fills in."""

MOST_VALUES: Final = 100_000
"""Values of such a file, with repeated parts counted wherever they occur."""


class _Number:
    """A number that keeps its notation, so that it can become a name such as `1.10` again."""

    written: str

    def __str__(self) -> str:
        return self.written


class _Whole(_Number, int):
    pass


class _Decimal(_Number, float):
    pass


class AsWritten(yaml.SafeLoader):
    """A YAML loader that keeps names verbatim and does not allow repeated names.

    YAML 1.1 reads `NO` as false, `010` as 8, `12:30` as 750 and `2024-01-01` as a date, and keeps
    the last of repeated names. Here only `true` and `false` are booleans, only decimal numbers
    without leading zeros are numbers, and a number keeps its notation in case text is needed.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML uses a class attribute

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the names and values of a mapping; raises a YAMLError for a repeated name."""
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                first = seen[key.value].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key.value!r} occurs twice, first in line {first}",
                    key.start_mark,
                )
            seen[getattr(key, "value", "")] = key
        return super().construct_mapping(node, deep)

    def get_single_data(self) -> Any:
        """Return the content; raises a YAMLError for a file that would grow when it is read.

        Names for repeated parts (`&a`, `*a`) let a few lines stand for billions of values.
        """
        node = self.get_single_node()
        return None if node is None else self._construct_bounded(node)

    def _construct_bounded(self, node: yaml.Node) -> Any:
        if _expanded(node, {}) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MOST_VALUES} values, repeated parts included", None
            )
        return self.construct_document(node)

    def whole(self, node: yaml.ScalarNode) -> int:
        """Return a whole number."""
        return _written(_Whole(node.value), node)

    def decimal(self, node: yaml.ScalarNode) -> float:
        """Return a decimal number."""
        return _written(_Decimal(node.value), node)


N = TypeVar("N", _Whole, _Decimal)


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Return the number of values of a node with every alias replaced; infinite for a cycle."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known: a node that contains itself never is
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(node)]


def _written(number: N, node: yaml.ScalarNode) -> N:
    number.written = node.value
    return number


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(0|[1-9][0-9]*)?\.[0-9]+([eE][-+]?[0-9]+)?|[-+]?(0|[1-9][0-9]*)(\.?[eE][-+]?[0-9]+|\.)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    AsWritten.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
AsWritten.add_constructor("tag:yaml.org,2002:int", AsWritten.whole)
AsWritten.add_constructor("tag:yaml.org,2002:float", AsWritten.decimal)


def read_tree(path: Path, code: str, action: str = "") -> dict[str, Any]:
    """Read the names and values of a YAML file.

    Args:
        path: The file.
        code: Error code of this type of file.
        action: What to do if the file does not exist.

    Raises:
        FedsgcgError: `code` for a file that is missing, unreadable or without settings.
    """
    try:
        with path.open("rb") as file:  # no more than the limit, however long the file is
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise yaml.YAMLError(f"more than {MOST_BYTES} bytes")
        tree = AsWritten(content.decode()).get_single_data()
    except FileNotFoundError as error:
        raise fail(code, where=str(path), found="no such file", action=action) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        found = " ".join(str(error).split())
        raise fail(code, where=str(path), found=found, expected="a readable YAML file") from error
    if not isinstance(tree, dict):
        raise fail(code, where=str(path), found="no settings", expected="name: value lines")
    return {str(name): value for name, value in tree.items()}


def build_from(
    cls: type[T], tree: Mapping[str, Any], path: Path, code: str, faults: tuple[Problem, ...] = ()
) -> T:
    """Build a typed section from the content of a file.

    Raises:
        FedsgcgError: `code`, with every problem of the file and those in `faults`.
    """
    problems = list(faults)
    try:
        found = build(cls, tree)
    except FedsgcgError as error:
        problems += [_of_file(problem, cls, path, code) for problem in error.problems]
        raise FedsgcgError(*problems) from error
    if problems:
        raise FedsgcgError(*problems)
    return found


def explained(section: Any, head: tuple[str, ...]) -> str:
    """Return the text of a YAML file, with the meaning of each field as a comment above it.

    Args:
        section: A dataclass whose docstring has an `Attributes:` section.
        head: Lines of the file's first comment.
    """
    meaning = meanings(type(section))
    lines = [*(f"# {line}" for line in head), ""]
    for name, value in dataclasses.asdict(section).items():
        lines += [f"# {line}" for line in meaning[name]]
        lines += [f"{name}: {_value(value)}", ""]
    return "\n".join(lines)


def _of_file(problem: Problem, cls: type, path: Path, code: str) -> Problem:
    where = f"{path}, {problem.where}" if problem.where not in ("", cls.__name__) else str(path)
    return dataclasses.replace(problem, code=code, where=where)


def _value(value: Any) -> str:
    """Return a value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def meanings(cls: type) -> dict[str, list[str]]:
    """Return field -> its lines in the class's docstring."""
    found: dict[str, list[str]] = {}
    name = ""
    # Python 3.13 removes the indentation of docstrings, earlier versions keep it.
    text = inspect.cleandoc(cls.__doc__ or "")
    for line in text.partition("Attributes:")[2].splitlines():
        if head := re.match(r"    (\w+): (.*)", line):
            name = head[1]
            found[name] = [head[2]]
        elif name and line.strip():
            found[name].append(line.strip())
    return found
