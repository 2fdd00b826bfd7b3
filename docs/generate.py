"""Writes the generated parts of the reference pages from the code: `python docs/generate.py`.

A page marks such a part with `<!-- generated: NAME -->` and `<!-- end -->`; everything in between
is replaced. `tests/contracts/test_docs.py` fails if a page is not up to date.
"""

from __future__ import annotations

import argparse
import ast
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
import yaml

from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.clients.methods.cards import cards
from fedsgcg.common.images.formats import DICOM, FORMATS
from fedsgcg.common.run_folder.events import EVERY_EVENT, RUN_EVENTS, STUDY_EVENTS, Event
from fedsgcg.common.run_folder.tables import CELL_FIELDS, RESULTS_SCHEMA, ROUNDS_SCHEMA
from fedsgcg.common.settings.base import bounds_of
from fedsgcg.common.settings.compose import CONFIGS, GROUPS, MAPS, choices_of, compose
from fedsgcg.common.settings.help import default_of
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.run import RunSettings
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.payload import CASES_SCHEMA
from fedsgcg.deploy.cli.methods import cost_text
from fedsgcg.deploy.coordinator.project import Project
from fedsgcg.deploy.study.costs import published_costs
from fedsgcg.server.telemetry.names import METRICS

DOCS: Final = Path(__file__).resolve().parent
MARK: Final = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MATRIX: Final = DOCS.parent / "tests" / "faults" / "matrix.yaml"
ATTACKS: Final = MATRIX.with_name("attacks.yaml")
ROW: Final = re.compile(r"Rows? (\d+(?:(?:, | and )\d+)*)[:.]")
WIDTH: Final = 88
"""Columns of the help texts."""

CELL: Final = {
    "method": "label of the variant: the method, and what the study varies of it",
    "heldout": "hospital that took no part in training; empty if all trained",
    "seed": "seed of the study",
    "trains": "training method, e.g. `source` or `ram_sgcg`",
    "federation": "`by_site`, `pooled` or `local`",
    "setting": "swept settings, e.g. `prototypes.weight=0.5`; empty without a sweep",
    "chosen": "settings that this fold's source hospitals chose (`select`), if any",
    "trained_on": "the one hospital that trained, with `federation=local`; else empty",
    "site": "hospital of the case",
}
ROUNDS: Final = {
    "round": "round number, from 1",
    "phase": "`train`, `merge`, `heldout` or `observer`",
    "site": "site that reported it; empty for all sites together",
    "cls": "class, for metrics of one class; else empty",
    "metric": "name of the metric, see below",
    "value": "value of the metric",
    "other": "second site of a pair, for `pair_distance`; else null",
}


def commands(script: str) -> str:
    """Return the help texts of a console script and of all its commands, each under a heading."""
    parts = [f"## {script}\n\n{_fenced(parser_of(script).format_help())}"]
    for command, parser in subparsers(script):
        parts.append(f"### {command}\n\n{_fenced(parser.format_help())}")
    return "\n\n".join(parts)


def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the argument parser of a console script of pyproject.toml."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module = import_module(project["scripts"][script].partition(":")[0])
    parser: argparse.ArgumentParser = module._parser()
    return parser


def subparsers(script: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield (command, parser) for every command of a console script, e.g. `fedsgcg data list`."""
    yield from _subparsers(parser_of(script), script)


def _subparsers(
    parser: argparse.ArgumentParser, prefix: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{prefix} {name}", command
                yield from _subparsers(command, f"{prefix} {name}")


def settings() -> str:
    """Return every setting that a user can change: type, default, meaning."""
    known = dict(_settings_of(Plan)) | dict(_settings_of(RunSettings))
    sections: dict[str, list[str]] = {}
    values = dict(_leaves(compose([])))
    for name, (kind, meaning) in known.items():
        if name not in values:  # filled in by a study
            continue
        value = values[name]
        default = default_of(name, value)
        shown = f"default {_value(default)}"
        if default != value:
            shown += f" ({_value(value)} with `data=synthetic`)"
        text = f"### `{name}`\n\n{_type(kind)}, {shown}\n\n{meaning}"
        sections.setdefault(name.rpartition(".")[0] or "study", []).append(text)
    order = sorted(
        sections, key=lambda title: (title.partition(".")[0] not in GROUPS, title != "study")
    )
    order = ["study", *(title for title in order if title != "study")]
    return "\n\n".join(f"## {title}\n\n" + "\n\n".join(sections[title]) for title in order)


def _settings_of(kind: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yield (dotted name, (type, meaning)) of every field of a settings class, recursively."""
    hints, meanings = typing.get_type_hints(kind), described(kind)
    bounds = bounds_of(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from _settings_of(typing.cast("type", inner), f"{prefix}{field.name}.")
        else:
            most = f"At most {bounds[field.name]:.0f}. " if field.name in bounds else ""
            yield prefix + field.name, (inner, most + meanings[field.name])


def method_cards() -> str:
    """Return a table of all methods with their costs, and a card of each with its settings."""
    rows, parts = [], []
    costs = published_costs()
    for card in cards():
        cost = costs.methods.get(card.name)
        figures = (f"{cost.step:.2f}", f"{cost.share:.3f}") if cost else ("–", "–")
        rows.append((f"[`{card.name}`](#{card.name})", card.idea, *figures, card.leaves))
        lines = [f"**Formula**: `{card.formula.rstrip('.')}`", f"**Leaves**: {card.leaves}"]
        lines += [f"**Defaults**: {card.defaults}", f"**Source**: {card.source}"]
        lines.append(f"**Cost**: {cost_text(cost)}.")
        if card.settings:
            lines.append("**Settings**: " + ", ".join(f"`{name}`" for name in card.settings))
        parts.append("\n\n".join([f"## {card.name}", card.idea, *lines]))
    titles = ("method", "idea", "time of a step", "bytes a round", "what leaves the hospital")
    note = (
        f"Time and bytes are relative to `source`. {costs.protocol}. {costs.machine}, {costs.date}."
    )
    return "\n\n".join([_table(titles, rows), note, *parts])


def groups() -> str:
    """Return a table of the choices of every group, each with the first sentence of its file."""
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
    """Return every entry of a YAML file that a settings class describes."""
    hints = typing.get_type_hints(kind)
    meanings = described(kind)
    parts = []
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING
        default = "needed" if needed else f"default {_value(field.default)}"
        parts.append(
            f"### `{field.name}`\n\n{_type(hints[field.name])}, {default}\n\n{meanings[field.name]}"
        )
    return "\n\n".join(parts)


def columns(schema: Sequence[pa.Field], known: Mapping[str, str]) -> str:
    """Return a table of columns; a column's own description has precedence over `known`."""
    rows = []
    for field in schema:
        notes = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        meaning = notes.get("description") or known[field.name]
        rows.append((f"`{field.name}`", str(field.type), notes.get("unit", ""), meaning))
    return _table(("column", "type", "unit", "meaning"), rows)


def message(kind: type) -> str:
    """Return a table of the fields of a request or a reply."""
    rows = [(f"`{name}`", text) for name, text in described(kind).items()]
    return _table(("field", "meaning"), rows)


def described(kind: type) -> dict[str, str]:
    """Return field -> its text in the `Attributes:` section of a class's docstring.

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
    """Remove references to modules, which a reader of the site cannot follow."""
    return re.sub(r"\s*\(`(?:common|clients|server)\.[^()]*\)", "", text)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and prefix + name not in MAPS:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _type(kind: Any) -> str:
    """Return the name of a type for someone who does not program."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "One of " + ", ".join(f"`{item}`" for item in arguments)
    if origin in (typing.Union, types.UnionType):
        return _type(next(item for item in arguments if item is not type(None)))
    names = {
        list: "List",
        tuple: "List",
        dict: "Map",
        int: "Whole number",
        float: "Number",
        bool: "True or false",
    }
    return names.get(origin or kind, "Text")


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
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        titles,
        ["---"] * len(titles),
        *([cell.replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def fault_matrix() -> str:
    """Return the table of the fault matrix: each row with its tests, or why it has none."""
    matrix = yaml.safe_load(MATRIX.read_text(encoding="utf-8"))
    tests = tests_by_row()
    rows = []
    for number, row in matrix["rows"].items():
        proof = _proof(tests.get(number, []))
        layer = matrix["layers"][row["layer"]]
        rows.append(
            (
                str(number),
                layer,
                row["fault"],
                row["outcome"],
                proof or f"no test: {row['untested']}",
            )
        )
    return _table(("row", "where", "fault", "outcome", "tests"), rows)


def attacks() -> str:
    """Return the tables of the attacks: each with what must follow and the tests that show it."""
    catalogue = yaml.safe_load(ATTACKS.read_text(encoding="utf-8"))
    tests = tests_by_attack()
    parts = []
    for title, entries in catalogue.items():
        rows = [
            (entry["attack"], entry["outcome"], _proof(tests.get(name, [])))
            for name, entry in entries.items()
        ]
        parts.append(f"### {title}\n\n" + _table(("attack", "outcome", "tests"), rows))
    return "\n\n".join(parts)


def metrics() -> str:
    """Return the table of the metrics."""
    rows = [
        (f"`{metric.exposed}`", metric.kind, ", ".join(metric.labels), metric.help)
        for metric in METRICS
    ]
    return _table(("name", "type", "labels", "meaning"), rows)


def event_fields() -> str:
    """Return the fields that every event of a run has."""
    rows = [(f"`{name}`", *facts) for name, facts in EVERY_EVENT.items()]
    return _table(("field", "type", "meaning"), rows)


def events(kinds: Mapping[str, Event]) -> str:
    """Return the events with their own fields."""
    rows = []
    for name, event in kinds.items():
        own = "<br>".join(
            f"`{field}` ({kind}): {meaning}" for field, (kind, meaning) in event.fields.items()
        )
        rows.append((f"`{name}`", event.meaning, own))
    return _table(("event", "meaning", "fields"), rows)


def tests_by_row() -> dict[int, list[tuple[str, str]]]:
    """Return the (file, name) of the tests of each row.

    A test names its rows by `@pytest.mark.row(N)` or by a docstring that starts with "Row N:".
    """
    return _tests_by(_rows_of)


def tests_by_attack() -> dict[str, list[tuple[str, str]]]:
    """Return the (file, name) of the tests of each attack, named by `@pytest.mark.attack(NAME)`."""
    return _tests_by(lambda test: set(_marks(test, "attack")))


def _tests_by(names_of: Callable[[ast.FunctionDef], set[Any]]) -> dict[Any, list[tuple[str, str]]]:
    found: dict[Any, list[tuple[str, str]]] = {}
    for path in sorted((DOCS.parent / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for name in sorted(names_of(node)):
                    place = path.relative_to(DOCS.parent).as_posix()
                    found.setdefault(name, []).append((place, node.name))
    return found


def _rows_of(test: ast.FunctionDef) -> set[int]:
    stated = ROW.match(ast.get_docstring(test) or "")
    rows = {int(text) for text in re.findall(r"\d+", stated[1])} if stated else set()
    return rows | set(_marks(test, "row"))


def _marks(test: ast.FunctionDef, name: str) -> Iterator[Any]:
    """Yield the arguments of a test's marks of some name."""
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == f"pytest.mark.{name}":
            yield from map(ast.literal_eval, mark.args)


def _proof(tests: Sequence[tuple[str, str]]) -> str:
    """Return a table's cell with tests."""
    return "<br>".join(f"`{path.partition('/')[2]}` {_plain_name(name)}" for path, name in tests)


def _plain_name(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def formats() -> str:
    """Return the table of image formats."""
    lines = ["| format | suffixes | read by | geometry | a predicted mask |", "|" + " --- |" * 5]
    for form in FORMATS:
        suffixes = " ".join(f"`{suffix}`" for suffix in form.suffixes)
        if form is DICOM:
            suffixes += " or none; a folder"
        cells = (form.name, suffixes, form.library, form.keeps, form.result)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    "fault-matrix": fault_matrix,
    "attacks": attacks,
    "metrics": metrics,
    "event-fields": event_fields,
    "run-events": lambda: events(RUN_EVENTS),
    "study-events": lambda: events(STUDY_EVENTS),
    "formats": formats,
    "methods": method_cards,
}


def generated(text: str) -> str:
    """Return a page with up-to-date generated parts."""
    return MARK.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n\n{found[3]}", text)


def pages() -> Iterator[tuple[Path, str, str]]:
    """Yield (path, current text, up-to-date text) of every page with a generated part."""
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
    """Write every page that changed and print its name."""
    for path, text, wanted in pages():
        if text != wanted:
            path.write_text(wanted, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(DOCS)}\n")


if __name__ == "__main__":
    main()
