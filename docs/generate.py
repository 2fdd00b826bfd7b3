"""Write the generated parts of the reference pages from the code: `python docs/generate.py`.

A page marks such a part with `<!-- generated: NAME -->` and `<!-- end -->`; everything between them is replaced, the
prose around it is left alone. `tests/contracts/test_docs.py` fails while a page is not what this script writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from clients.guard.site_file import SiteFile
from common.run_folder import CELL_FIELDS, RESULTS_SCHEMA, ROUNDS_SCHEMA
from common.settings.compose import CONFIGS, GROUPS, choices_of, compose
from common.settings.plan import Plan
from common.wire import messages as wire
from common.wire.payload import CASES_SCHEMA
from deploy.coordinator.project import Project

DOCS: Final = Path(__file__).resolve().parent
MARK: Final = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH: Final = 88
"""Columns of the command lines' help."""

CELL: Final = {
    "method": "label of what is compared: the method, and what the study varies of it",
    "heldout": "hospital that took no part in training; empty where all trained",
    "seed": "seed of the study",
    "trains": "training method: `source`, `ram`, `sgcg` or `ram_sgcg`",
    "federation": "`by_site`, `pooled` or `local`",
    "setting": "swept settings, e.g. `prototypes.weight=0.5`; empty without a sweep",
    "chosen": "settings that this fold's source hospitals chose (`select`); empty without",
    "trained_on": "the one hospital that trained, with `federation=local`; else empty",
    "site": "hospital whose case it is",
}
ROUNDS: Final = {
    "round": "round number, from 1",
    "phase": "`train`, `merge`, `heldout` or `observer`",
    "site": "site that reported it; empty for all sites together",
    "cls": "class, for figures of one class; else empty",
    "metric": "name of the figure, see below",
    "value": "the figure",
}


def commands(script: str) -> str:
    """Help texts of a console script and of all its commands, each under a heading."""
    parts = [f"## {script}\n\n{_fenced(parser_of(script).format_help())}"]
    for words, parser in subparsers(script):
        parts.append(f"### {words}\n\n{_fenced(parser.format_help())}")
    return "\n\n".join(parts)


def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the argument parser behind a console script of pyproject.toml."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module = import_module(project["scripts"][script].partition(":")[0])
    parser: argparse.ArgumentParser = module._parser()
    return parser


def subparsers(script: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield (words, parser) of every command of a console script, e.g. `fedsgcg data list`."""
    yield from _subparsers(parser_of(script), script)


def _subparsers(
    parser: argparse.ArgumentParser, words: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{words} {name}", command
                yield from _subparsers(command, f"{words} {name}")


def settings() -> str:
    """Every setting that a user can give: type, default, meaning."""
    known = dict(_plan_settings(Plan))
    sections: dict[str, list[str]] = {}
    for name, value in _leaves(compose([])):
        kind, meaning = known.get(name) or (type(value), _comment(name))
        text = f"### `{name}`\n\n{_type(kind)}, default {_value(value)}\n\n{meaning}"
        sections.setdefault(name.rpartition(".")[0] or "study", []).append(text)
    order = sorted(
        sections, key=lambda title: (title.partition(".")[0] not in GROUPS, title != "study")
    )
    order = ["study", *(title for title in order if title != "study")]
    return "\n\n".join(f"## {title}\n\n" + "\n\n".join(sections[title]) for title in order)


def _plan_settings(kind: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yield (dotted name, (type, meaning)) of every field of a settings class and of those inside it."""
    hints, meanings = typing.get_type_hints(kind), described(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from _plan_settings(typing.cast("type", inner), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, (inner, meanings[field.name])


def _comment(name: str) -> str:
    """Return the comment of a setting that only `configs/run.yaml` has."""
    last = name.rpartition(".")[2]
    found = re.search(
        rf"^\s*{last}:[^#\n]*# (.*)$",
        (CONFIGS / "run.yaml").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    if found is None:
        raise ValueError(
            f"{name}: found no comment in run.yaml, expected one that says what it means"
        )
    return found[1][:1].upper() + found[1][1:] + "."


def groups() -> str:
    """Table of the choices of every group, each with the first sentence of its file."""
    rows = []
    for group in GROUPS:
        for name in choices_of(group):
            rows.append((f"`{group}={name}`", _first_sentence(CONFIGS / group / f"{name}.yaml")))
    return _table(("choice", "what it is"), rows)


def _first_sentence(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("# @package")]
    head = [line.removeprefix("#").strip() for line in lines[: _comment_lines(lines)]]
    text = re.split(r"(?<=\.) (?=[A-Z])", " ".join(head))[0]
    return _without_notes(text).rstrip(".:")


def _comment_lines(lines: Sequence[str]) -> int:
    return next(
        (number for number, line in enumerate(lines) if not line.startswith("#")), len(lines)
    )


def file_settings(kind: type) -> str:
    """Every entry of a YAML file that a settings class describes."""
    hints, meanings, parts = typing.get_type_hints(kind), described(kind), []
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING
        default = "needed" if needed else f"default {_value(field.default)}"
        parts.append(
            f"### `{field.name}`\n\n{_type(hints[field.name])}, {default}\n\n{meanings[field.name]}"
        )
    return "\n\n".join(parts)


def columns(schema: Sequence[pa.Field], known: Mapping[str, str]) -> str:
    """Table of columns: name, type, unit, meaning; a column's own description comes before `known`."""
    rows = []
    for field in schema:
        notes = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        meaning = notes.get("description") or known[field.name]
        rows.append((f"`{field.name}`", str(field.type), notes.get("unit", ""), meaning))
    return _table(("column", "type", "unit", "meaning"), rows)


def message(kind: type) -> str:
    """Table of the fields of a request or a reply."""
    return _table(
        ("field", "meaning"), [(f"`{name}`", text) for name, text in described(kind).items()]
    )


def described(kind: type) -> dict[str, str]:
    """Field -> its text in the `Attributes:` section of a class's docstring, without references to notes and modules.

    Raises:
        ValueError: A field without a text, unless it is a section of settings.
    """
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\w+: )", textwrap.dedent(section)):
        name, _, text = entry.partition(":")
        found[name.strip()] = _without_notes(" ".join(text.split()))
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    names = [name for name in names if name in found or not dataclasses.is_dataclass(hints[name])]
    if missing := set(names) - set(found):
        raise ValueError(
            f"{kind.__name__}: found no text for {sorted(missing)}, expected one for every field"
        )
    return {name: found[name] for name in names}


def _without_notes(text: str) -> str:
    """Drop references that a reader of the site cannot follow."""
    return re.sub(
        r"\s*\((?:methods\.md|README|\d\.\d|`(?:common|clients|server)\.)[^()]*\)", "", text
    )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        whole = name in ("classes", "structures", "grid")
        if isinstance(value, Mapping) and not whole:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _type(kind: Any) -> str:
    """Say what a type is to someone who does not program."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "One of " + ", ".join(f"`{item}`" for item in arguments)
    if origin in (typing.Union, types.UnionType):
        return _type(next(item for item in arguments if item is not type(None)))
    words = {
        list: "List",
        tuple: "List",
        dict: "Map",
        int: "Whole number",
        float: "Number",
        bool: "True or false",
    }
    return words.get(origin or kind, "Text")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value in ("", [], (), {}, None):
        return "empty"
    if isinstance(value, (list, tuple)):
        return "`[" + ", ".join(map(str, value)) + "]`"
    if isinstance(value, Mapping):
        return "`{" + ", ".join(f"{name}: {_plain(item)}" for name, item in value.items()) + "}`"
    return f"`{value}`"


def _plain(value: Any) -> str:
    return (
        "[" + ", ".join(map(str, value)) + "]" if isinstance(value, (list, tuple)) else str(value)
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        titles,
        ["---"] * len(titles),
        *([cell.replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


PARTS: Final[dict[str, Callable[[], str]]] = {
    "fedsgcg": lambda: commands("fedsgcg"),
    "fedsgcg-site": lambda: commands("fedsgcg-site"),
    "groups": groups,
    "settings": settings,
    "site-yaml": lambda: file_settings(SiteFile),
    "project-yaml": lambda: file_settings(Project),
    "results-cell": lambda: columns([*CELL_FIELDS, RESULTS_SCHEMA.field("site")], CELL),
    "results-case": lambda: columns(CASES_SCHEMA, {}),
    "rounds": lambda: columns(list(ROUNDS_SCHEMA)[len(CELL_FIELDS) :], ROUNDS),
    "request": lambda: message(wire.Request),
    "reply": lambda: message(wire.Reply),
}


def generated(text: str) -> str:
    """Return a page with its generated parts as the code has them now."""
    return MARK.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n\n{found[3]}", text)


def pages() -> Iterator[tuple[Path, str, str]]:
    """Yield (path, text as it is, text as it should be) of every page with a generated part."""
    columns_before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        for path in sorted(DOCS.rglob("*.md")):
            text = path.read_text(encoding="utf-8")
            if MARK.search(text):
                yield path, text, generated(text)
    finally:
        if columns_before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns_before


def main() -> None:
    """Write every page that changed and name it."""
    for path, text, wanted in pages():
        if text != wanted:
            path.write_text(wanted, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(DOCS)}\n")


if __name__ == "__main__":
    main()
