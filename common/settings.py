"""Settings: one function joins YAML, command line and Flower's run config; another turns the tree into typed settings.

Precedence, lowest first: `configs/run.yaml` and its groups, an `experiment`, the command line. A Flower run carries the
resolved tree in one string, `config-json` (stack.md 2.6), or a line of overrides in `overrides`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import shlex
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from common.errors import FedsgcgError, Problem, fail
from common.names import printable, spelled
from common.system import expand

if TYPE_CHECKING:
    from common.plan import Plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GROUPS = ("data", "network", "method", "federation", "prototypes", "privacy", "site", "experiment")
# Folders and names: whatever a user writes is meant to the letter, with blanks, commas, brackets and equals signs.
FOLDERS = ("data.root", "output", "site.home", "site.cache")
LITERAL = (*FOLDERS, "ray.address", "run", "heldout")
# Lists of hospitals' names: Hydra's grammar would make numbers of 1_000 and 1.10, and nothing of null.
NAMES = ("data.sites", "observers")

T = TypeVar("T")


def join(overrides: Sequence[str] = (), run_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Join YAML, command line and Flower's run config into one resolved tree.

    Args:
        overrides: Hydra overrides, e.g. `["method=source", "federation.rounds=3"]`.
        run_config: Flower's flat run config; `config-json` replaces the YAML, `overrides` is put before `overrides`.

    Raises:
        FedsgcgError: CFG-001 with every unknown setting and the nearest known one, and every setting given twice.
    """
    run_config = run_config or {}
    if text := str(run_config.get("config-json", "")):
        if overrides or run_config.get("overrides"):
            raise fail("CFG-001", found="config-json and overrides", expected="one of the two", where="run config")
        return cast("dict[str, Any]", json.loads(text))
    given = [*_words(str(run_config.get("overrides", ""))), *overrides]
    if twice := list(_given_twice(given)):
        raise FedsgcgError(*twice, *_mistakes(given))
    return compose(given)


def plan_of_run(tree: Mapping[str, Any] | None, run_config: Mapping[str, Any], run_id: int) -> Plan:
    """Return the plan of a Flower run, the same at both ends.

    Args:
        tree: Resolved settings of a simulation; None reads the run config.
        run_config: Flower's flat run config.
        run_id: Names the folder under $FEDSGCG_HOME (or ~/.fedsgcg) that a run without `output` gets.

    Raises:
        FedsgcgError: CFG-001 with every problem of the settings.
    """
    from common.plan import Plan

    plan = Plan.from_tree(join(run_config=run_config) if tree is None else tree)
    if plan.output:
        return plan
    home = expand(os.environ.get("FEDSGCG_HOME") or "~/.fedsgcg", "output or FEDSGCG_HOME")
    return dataclasses.replace(plan, output=str(home / "runs" / str(run_id)))


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose `configs/run.yaml` with Hydra, after checking that every override names something that exists.

    Of a setting given twice the last counts. The values of `LITERAL` and `NAMES` never reach Hydra's grammar.

    Raises:
        FedsgcgError: CFG-001 with every override that cannot be used.
    """
    if problems := _mistakes(overrides):
        raise FedsgcgError(*problems)
    plain = [text for text in overrides if not _is_literal(text)]
    try:
        tree = _composed(plain)
    except _hydra_errors() as error:
        faulty = [text for text in plain if not _composes(text)] or plain
        raise FedsgcgError(*(_unreadable(text) for text in faulty)) from error
    for text in overrides:
        if _is_literal(text):
            key, _, value = text.partition("=")
            _put(tree, key, _names(value) if key in NAMES else _literal(key, value))
    return tree


def build(cls: type[T], tree: Mapping[str, Any]) -> T:
    """Build a settings dataclass from plain dictionaries, raising one error that lists every problem."""
    problems: list[Problem] = []
    value = _convert(cls, tree, "", problems)
    if problems:
        raise FedsgcgError(*problems)
    return cast("T", value)


def nearest(word: str, known: Sequence[str], *, listed: bool = False) -> str:
    """Return a hint such as "did you mean x?" for an unknown word, or the list when nothing is near.

    Args:
        word: What was given.
        known: What there is.
        listed: Whether the message lists what there is already; then there is no hint when nothing is near.
    """
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.5):
        same = unicodedata.normalize("NFC", word) == unicodedata.normalize("NFC", close[0])
        apart = f" It is spelled {spelled(close[0])}, not {spelled(word)}: copy the folder's own name." if same else ""
        return f"did you mean {close[0]!r}?{apart}"
    return "" if listed else f"known: {', '.join(sorted(known)[:30])}"


def choices_of(group: str) -> list[str]:
    """Names that a group offers, e.g. `choices_of("data")`."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml") if not path.stem.startswith("_"))


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra_compose("run", list(overrides))
        return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))


@functools.lru_cache
def _known_settings(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Names of all settings and sections under some choices of groups, sorted."""
    return tuple(sorted(_flatten(_composed(choices))))


def _hydra_errors() -> tuple[type[Exception], ...]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return HydraException, OmegaConfBaseException


def _composes(text: str) -> bool:
    try:
        _composed([text])
    except _hydra_errors():
        return False
    return True


def _key(text: str) -> str:
    return text.partition("=")[0]


def _literal(key: str, value: str) -> str:
    """Return a value as it was meant: without quotes about the whole of it, a folder with the home directory put in."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1].replace("\\" + value[0], value[0])
    return str(expand(value, key)) if value and key in FOLDERS else value


def _is_literal(text: str) -> bool:
    """Whether an override's value is meant to the letter; a list of names that is no list is left to Hydra's errors."""
    key, _, value = text.partition("=")
    return key in LITERAL or (key in NAMES and _names(value) is not None)


def _names(text: str) -> list[str] | None:
    """Return the names of `[A, "B, C", 010]` as they are written, None for text that is no such list."""
    inner = re.fullmatch(r"\s*\[(.*)\]\s*", text)
    if inner is None:
        return None
    quoted = r'"((?:[^"\\]|\\.)*)"' + r"|'((?:[^'\\]|\\.)*)'"
    item = re.compile(rf"\s*(?:{quoted}|([^,'\"\[\]{{}}]+?))\s*(,|$)")
    names: list[str] = []
    place, rest = 0, inner[1]
    while place < len(rest):
        found = item.match(rest, place)
        if found is None:
            return None
        double, single, plain = found.group(1, 2, 3)
        names.append(plain if plain is not None else re.sub(r"\\(.)", r"\1", double if double is not None else single))
        place = found.end()
    return None if rest.rstrip().endswith(",") else names


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[name] = value


def _words(line: str) -> list[str]:
    """Split a line of overrides as a shell does."""
    try:
        return shlex.split(line)
    except ValueError as error:
        action = "close every quote"
        raise fail("CFG-001", where="overrides", found=line, expected="name=value ...", action=action) from error


def _given_twice(overrides: Sequence[str]) -> Iterator[Problem]:
    values: dict[str, list[str]] = {}
    for text in overrides:
        values.setdefault(_key(text), []).append(text)
    for key, texts in values.items():
        if len(texts) > 1:
            found = " and ".join(texts)
            yield Problem("CFG-001", where=key, found=found, expected="one value", action="leave one of them out")


def _mistakes(overrides: Sequence[str]) -> list[Problem]:
    """Return everything that is wrong with the overrides before any value is looked at."""
    problems: list[Problem] = []
    choices, named = [], []
    for text in overrides:
        key, separator, value = text.partition("=")
        if printable(text) != text:
            action = "rename the folder or file; names are written in UTF-8"
            problems.append(Problem("CFG-001", found=text, expected="text in UTF-8", action=action, where=key))
        elif not separator and not text.startswith(("+", "~")):
            problems.append(Problem("CFG-001", found=text, expected="name=value", where="command line"))
        elif key not in GROUPS:
            named.append(text)
        elif value in choices_of(key):
            choices.append(text)
        else:
            expected, action = " | ".join(choices_of(key)), nearest(value, choices_of(key), listed=True)
            problems.append(Problem("CFG-001", found=text, expected=expected, action=action))
    known = _known_settings(tuple(choices))
    for text in named:
        if _key(text) not in known:
            problems.append(_unknown(_key(text), known))
        elif not _is_literal(text) and not _is_one_value(text):
            problems.append(_unreadable(text))
        problems += _repeated_names(text)
    return problems


def _repeated_names(text: str) -> Iterator[Problem]:
    """Yield a problem for every name that a value in braces has twice: Hydra would keep the last."""
    key, _, value = text.partition("=")
    if _is_literal(text) or "{" not in value:
        return
    seen: list[set[str]] = []
    for mark in re.finditer(r"\"[^\"]*\"|'[^']*'|[{}]|[^\s,:{}\[\]]+(?=\s*:)", value):
        word = mark[0]
        if word == "{":
            seen.append(set())
        elif word == "}":
            seen = seen[:-1]
        elif seen and value[mark.end() :].lstrip().startswith(":"):
            name = word.strip("'\"")
            if name in seen[-1]:
                found, action = f"{name} twice in {value}", "leave one of them out"
                yield Problem("CFG-001", where=key, found=found, expected="each name once", action=action)
            seen[-1].add(name)


def _is_one_value(text: str) -> bool:
    """Whether Hydra reads an override as one value; `1,2` without brackets is a sweep over two."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return not OverridesParser.create().parse_override(text).is_sweep_override()
    except _hydra_errors():
        return False


def _unreadable(text: str) -> Problem:
    key, _, value = text.partition("=")
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    action = f"put the value in quotes: '{key}=\"{quoted}\"'"
    if "," in value or value.startswith("["):
        action += f'; of a list, each part: \'{key}=["A","B"]\''
    return Problem("CFG-001", where=key, found=text, expected="name=value", action=action)


def _unknown(key: str, known: Sequence[str]) -> Problem:
    """Return the problem of a name that no setting has, with the one that was probably meant."""
    hint = _meant(key.lstrip("+~"), known)
    return Problem("CFG-001", found=f"unknown setting {key!r}", expected="a known setting", action=hint)


def _meant(key: str, known: Sequence[str]) -> str:
    # A user who writes `rounds` means `federation.rounds`: the last part of a name is a way to call it.
    ends = {name.rpartition(".")[2]: name for name in reversed(known)} | {name: name for name in [*known, *GROUPS]}
    group, _, tail = key.rpartition(".")
    inside = [name.removeprefix(f"{group}.") for name in known if group and name.startswith(f"{group}.")]
    if key in ends:
        close = [ends[key]]
    elif inside:
        close = [f"{group}.{name}" for name in _alike(tail, inside)] or [ends[tail] for _ in range(tail in ends)]
        close = close or [f"{group}.{name}" for name in difflib.get_close_matches(tail, inside, n=1)]
        if not close:
            return f"settings of {group}: {', '.join(inside)}"
    else:
        close = [ends[name] for word in (key, tail) for name in difflib.get_close_matches(word, list(ends), 1, 0.5)]
    return f"did you mean {close[0]!r}?" if close else "see `fedsgcg settings`"


def _alike(word: str, names: Sequence[str]) -> list[str]:
    """Names that a short form may stand for: their initials (`lr`), then their beginning, then a part of them."""
    initials = [name for name in names if "".join(part[:1] for part in name.split("_")) == word]
    begins = [name for name in names if len(word) > 1 and name.startswith(word)]
    return [*initials, *begins, *(name for name in names if len(word) > 2 and word in name)]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")


def _convert(kind: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    """Convert `value` to the annotation `kind`; what does not fit becomes a problem and None."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_section(kind, value, path, problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in arguments:
        return arguments[arguments.index(value)]
    if origin in (typing.Union, types.UnionType) and value is None and type(None) in arguments:
        return None
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _convert(arguments[1], item, f"{path}.{key}", problems) for key, item in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)  # a hospital called 12; a number of a YAML file knows how it was written
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    expected = " | ".join(str(item) for item in arguments) if origin is Literal else _in_words(origin or kind)
    action = "write it in quotes" if kind is str and (value is None or isinstance(value, bool)) else ""
    problems.append(Problem("CFG-001", where=path, found=_found(value), expected=expected, action=action))
    return None


def _found(value: Any) -> str:
    """Say what a value is as settings are written."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _in_words(kind: Any) -> str:
    """Say what a type is to someone who does not program."""
    words = {
        list: "a list such as [A,B]",
        tuple: "a list such as [A,B]",
        dict: "names and values such as {A: 1}",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }
    return words.get(kind, str(kind))


def _convert_section(kind: type, value: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(Problem("CFG-001", where=path, found=repr(value), expected=_in_words(dict)))
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
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    for name in sorted(required - set(value)):
        problems.append(Problem("CFG-001", where=f"{path}.{name}".lstrip("."), found="nothing", expected="a value"))
    converted = {}
    for name in (name for name in value if name in names):
        faults = len(problems)
        item = _convert(hints[name], value[name], f"{path}.{name}".lstrip("."), problems)
        if len(problems) == faults:
            converted[name] = item
    if required - set(converted):
        return None
    try:  # also with some values refused: the rules of the others are checked with defaults in their place
        return kind(**converted)
    except FedsgcgError as error:
        problems.extend(dataclasses.replace(p, where=f"{path}.{p.where}".lstrip(".")) for p in error.problems)
        return None
