"""Settings: one function joins YAML, command line and Flower's run config; another turns the tree into typed settings.

Precedence, lowest first: `configs/run.yaml` and its groups, an `experiment`, the command line. A Flower run carries the
resolved tree in one string, `config-json` (stack.md 2.6), or a line of overrides in `overrides`.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from common.errors import FedsgcgError, Problem, fail
from common.files.system import expand
from common.names import printable
from common.settings.build import build
from common.settings.choices import (
    BASES,
    CLASSES,
    CONFIGS,
    GROUPS,
    OwnFile,
    choices_of,
    hydra_name,
    is_file,
    is_import_path,
    offered,
    own_files,
    unquoted,
)
from common.settings.hints import meant, nearest
from common.settings.resolve import resolve_own_code

__all__ = ["GROUPS", "build", "choices_of", "compose", "join", "nearest"]

# Folders and names: whatever a user writes is meant to the letter, with blanks, commas, brackets and equals signs.
FOLDERS = ("data.root", "output", "site.home", "site.cache", "config_dir")
LITERAL = (*FOLDERS, "ray.address", "run", "heldout")
# Lists of hospitals' names: Hydra's grammar would make numbers of 1_000 and 1.10, and nothing of null.
NAMES = ("data.sites", "observers")
# Maps whose names are the user's: one on the command line replaces the one of the data set, it is not merged with it.
MAPS = ("data.classes", "data.structures", "grid", "method.options", "network.options")
INSIDE_MAPS = tuple(f"{name}." for name in MAPS)


def join(
    overrides: Sequence[str] = (), run_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Join YAML, command line and Flower's run config into one resolved tree.

    Args:
        overrides: Hydra overrides, e.g. `["method=source", "federation.rounds=3"]`.
        run_config: Flower's flat run config; `config-json` replaces the YAML, `overrides` is put before `overrides`.

    Raises:
        FedsgcgError: CFG-001 with every unknown setting and the nearest known one, and every setting given twice.
            CFG-011 for a class by import path that cannot be used.
    """
    run_config = run_config or {}
    if text := str(run_config.get("config-json", "")):
        if overrides or run_config.get("overrides"):
            raise fail(
                "CFG-001",
                found="config-json and overrides",
                expected="one of the two",
                where="run config",
            )
        return cast("dict[str, Any]", json.loads(text))
    from_flower = _words(str(run_config.get("overrides", "")))
    if own := [text for text in from_flower if _is_of_this_machine(text)]:
        raise FedsgcgError(*(_only_resolved(text) for text in own))
    given = [*from_flower, *overrides]
    if twice := list(_given_twice(given)):
        raise FedsgcgError(*twice, *_mistakes(given, _own_files(given)))
    return compose(given)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose `configs/run.yaml` with Hydra, after checking that every override names something that exists.

    Of a setting given twice the last counts. The values of `LITERAL`, `NAMES` and `MAPS` do not pass through Hydra's
    merging, those of the first two not through its grammar either.

    Raises:
        FedsgcgError: CFG-001 with every override and every own file that cannot be used.
    """
    own = _own_files(overrides)
    if problems := _mistakes(overrides, own):
        raise FedsgcgError(*problems)
    plain = _all_for_hydra(overrides)
    tree = _readable(plain, own)
    if problems := _unknown_in_files(tree, own):
        raise FedsgcgError(*problems)
    for text in overrides:
        if _is_put(text):
            key, _, value = text.partition("=")
            _put(tree, f"{key}.name" if key in CLASSES else key, _value_put(key, value))
    resolve_own_code(tree)
    return tree


def chosen(overrides: Sequence[str]) -> dict[str, str]:
    """Return the choice of each group that overrides and the files they name lead to."""
    own = _own_files(overrides)
    plain = _all_for_hydra(overrides)
    choices = _hydra_config(tuple(plain), own).hydra.runtime.choices
    return {group: str(choices[group]) for group in GROUPS}


def own_choices(overrides: Sequence[str]) -> tuple[OwnFile, ...]:
    """Return the user's own files that overrides lead to, for `choices_of`."""
    return _own_files(overrides)


def _own_files(overrides: Sequence[str]) -> tuple[OwnFile, ...]:
    """Read the user's own files that overrides name: the folder `config_dir`, and YAML files as choices."""
    values = dict(text.partition("=")[::2] for text in overrides)
    directory = _literal("config_dir", values.get("config_dir", ""))
    named = [
        (key, unquoted(value))
        for key, value in values.items()
        if key in GROUPS and is_file(unquoted(value))
    ]
    return own_files(directory, named)


def _hydra_config(overrides: Sequence[str], own: tuple[OwnFile, ...]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with offered(own), initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose("run", list(overrides), return_hydra_config=True)


def _composed(overrides: Sequence[str], own: tuple[OwnFile, ...]) -> dict[str, Any]:
    from omegaconf import OmegaConf, open_dict

    composed = _hydra_config(overrides, own)
    with open_dict(composed):
        del composed["hydra"]
    return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))


def _readable(overrides: Sequence[str], own: tuple[OwnFile, ...]) -> dict[str, Any]:
    """Compose; what Hydra refuses is named by the override, or the file, that it does not take."""
    try:
        return _composed(overrides, own)
    except _hydra_errors() as error:
        faulty = [text for text in overrides if not _composes(text, own)]
        files = [text for text in faulty if _key(text) in GROUPS]
        if files or not faulty:
            found = " ".join(str(error).split())
            where = ", ".join(file.path for file in own)
            raise fail(
                "CFG-001", where=where, found=found, expected="files that can be composed"
            ) from error
        raise FedsgcgError(*(_unreadable(text) for text in faulty)) from error


@functools.cache
def known_settings() -> tuple[str, ...]:
    """Names of all settings and sections, sorted; they are the same for all choices, but for entries of `MAPS`."""
    return tuple(
        sorted(name for name in _flatten(_composed([], ())) if not name.startswith(INSIDE_MAPS))
    )


def _unknown_in_files(tree: Mapping[str, Any], own: tuple[OwnFile, ...]) -> list[Problem]:
    """Return a problem for every name of own files that no setting has; Hydra takes any name of a file."""
    if not own:
        return []
    known = known_settings()
    unknown = [
        name for name in _flatten(tree) if name not in known and not name.startswith(INSIDE_MAPS)
    ]
    where = ", ".join(file.path for file in own)
    return [
        _unknown(name, known, where) for name in unknown if name.rpartition(".")[0] not in unknown
    ]


def _hydra_errors() -> tuple[type[Exception], ...]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return HydraException, OmegaConfBaseException


def _composes(text: str, own: tuple[OwnFile, ...]) -> bool:
    try:
        _composed([text], own)
    except _hydra_errors():
        return False
    return True


def _key(text: str) -> str:
    return text.partition("=")[0]


def _literal(key: str, value: str) -> str:
    """Return a value as it was meant: without quotes about the whole of it, a folder with the home directory put in."""
    value = unquoted(value)
    return str(expand(value, key)) if value and key in FOLDERS else value


def _is_literal(text: str) -> bool:
    """Whether an override's value is meant to the letter; a list of names that is no list is left to Hydra's errors."""
    key, _, value = text.partition("=")
    return key in LITERAL or (key in NAMES and _names(value) is not None)


def _is_put(text: str) -> bool:
    """Whether an override's value is put into the composed tree, past Hydra's merging."""
    return _is_literal(text) or _key(text) in MAPS or _is_class(text)


def _is_class(text: str) -> bool:
    """Whether an override names a method or network by import path: `method=package.module:Class`."""
    key, _, value = text.partition("=")
    return key in CLASSES and is_import_path(value)


def _is_of_this_machine(text: str) -> bool:
    """Whether an override leads to files or code of the machine that resolves it."""
    key, _, value = text.partition("=")
    return (
        key == "config_dir" or is_import_path(value) or (key in GROUPS and is_file(unquoted(value)))
    )


def _only_resolved(text: str) -> Problem:
    """Return the problem of an override that every hospital would resolve with files or code of its own."""
    action = "start the run with `fedsgcg`, which sends the resolved settings (config-json)"
    expected = "settings that are the same on every machine"
    return Problem("CFG-001", where="overrides", found=text, expected=expected, action=action)


def _all_for_hydra(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that Hydra composes; a class starts from the base of its group."""
    classes = [_key(text) for text in overrides if _is_class(text)]
    return [
        *(_for_hydra(text) for text in overrides if not _is_put(text)),
        *(f"{group}={BASES[group]}" for group in classes),
    ]


def _for_hydra(text: str) -> str:
    """Return an override as Hydra takes it: a file by the name that its store has for it."""
    key, _, value = text.partition("=")
    return (
        f"{key}={hydra_name(unquoted(value))}"
        if key in GROUPS and is_file(unquoted(value))
        else text
    )


def _value_put(key: str, value: str) -> Any:
    """Return the value that is put into the tree."""
    if key in CLASSES:
        return value
    if key in MAPS:
        return _parsed(f"{key}={value}")
    return _names(value) if key in NAMES else _literal(key, value)


def _parsed(text: str) -> Any:
    """Return the value of an override in Hydra's grammar, as plain lists, dictionaries, numbers and text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    value = OverridesParser.create().parse_override(text).value()
    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]  # type: ignore[index, call-overload]


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
        names.append(
            plain
            if plain is not None
            else re.sub(r"\\(.)", r"\1", double if double is not None else single)
        )
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
        raise fail(
            "CFG-001", where="overrides", found=line, expected="name=value ...", action=action
        ) from error


def _given_twice(overrides: Sequence[str]) -> Iterator[Problem]:
    values: dict[str, list[str]] = {}
    for text in overrides:
        values.setdefault(_key(text), []).append(text)
    for key, texts in values.items():
        if len(texts) > 1:
            found = " and ".join(texts)
            yield Problem(
                "CFG-001",
                where=key,
                found=found,
                expected="one value",
                action="leave one of them out",
            )


def _mistakes(overrides: Sequence[str], own: tuple[OwnFile, ...]) -> list[Problem]:
    """Return everything that is wrong with the overrides before any value is looked at."""
    problems: list[Problem] = []
    named = []
    for text in overrides:
        key, separator, value = text.partition("=")
        choices = choices_of(key, own) if key in GROUPS else []
        if printable(text) != text:
            action = "rename the folder or file; names are written in UTF-8"
            problems.append(
                Problem("CFG-001", found=text, expected="text in UTF-8", action=action, where=key)
            )
        elif text.startswith(("+", "~")):
            problems.append(_added_or_removed(text))
        elif not separator:
            problems.append(
                Problem("CFG-001", found=text, expected="name=value", where="command line")
            )
        elif key not in GROUPS:
            named.append(text)
        elif value not in choices and not is_file(unquoted(value)) and not _is_class(text):
            expected, action = " | ".join(choices), nearest(value, choices, listed=True)
            problems.append(Problem("CFG-001", found=text, expected=expected, action=action))
    known = known_settings()
    for text in named:
        inside = _key(text).startswith(INSIDE_MAPS)
        whole = [
            other
            for other in named
            if inside and _key(other) in MAPS and _key(text).startswith(_key(other) + ".")
        ]
        if whole:
            found, action = f"{whole[0]} and {text}", "put the entry into the map"
            problems.append(
                Problem(
                    "CFG-001", where=_key(text), found=found, expected="one of them", action=action
                )
            )
            continue
        if _key(text) not in known and not (inside and _is_inside_a_map(text, overrides, own)):
            problems.append(_unknown(_key(text), known))
        elif not _is_literal(text) and not _is_one_value(text):
            problems.append(_unreadable(text))
        problems += _repeated_names(text)
    return problems


def _is_inside_a_map(text: str, overrides: Sequence[str], own: tuple[OwnFile, ...]) -> bool:
    """Whether an override names an entry that a map of the chosen groups has, e.g. `data.classes.gland`."""
    groups = [
        _for_hydra(other)
        for other in overrides
        if _key(other) in GROUPS and not _is_wrong_choice(other, own)
    ]
    return _key(text) in set(_flatten(_readable(groups, own)))


def _is_wrong_choice(text: str, own: tuple[OwnFile, ...]) -> bool:
    key, _, value = text.partition("=")
    return value not in choices_of(key, own) and not is_file(
        unquoted(value)
    )  # classes have no maps


def _added_or_removed(text: str) -> Problem:
    """Return the problem of `+name=value`, `++name=value` and `~name`, which Hydra has and fedsgcg has no use for."""
    sign = text[: len(text) - len(text.lstrip("+~"))]
    plain = text.lstrip("+~")
    key = _key(plain)
    known = known_settings()
    if key not in known and key not in GROUPS:
        return _unknown(key, known)
    if sign == "~":
        action = f"every run has this setting: give it a value, {key}=VALUE, or leave it out for the default"
        return Problem(
            "CFG-001", found=text, expected="name=value: a setting cannot be removed", action=action
        )
    return Problem(
        "CFG-001",
        found=text,
        expected="name=value: every setting is there",
        action=f"write {plain}",
    )


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
                yield Problem(
                    "CFG-001", where=key, found=found, expected="each name once", action=action
                )
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


def _unknown(key: str, known: Sequence[str], where: str = "") -> Problem:
    """Return the problem of a name that no setting has, with the one that was probably meant."""
    found, action = f"unknown setting {key!r}", meant(key, known)
    return Problem("CFG-001", found=found, expected="a known setting", action=action, where=where)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
