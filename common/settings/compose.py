"""Composes YAML files, the command line and Flower's run config into one resolved tree.

Precedence, lowest first: the typed defaults, the groups of `configs/run.yaml`, an `experiment`, the
command line. A Flower run carries the resolved tree as a string, `config-json`, because `flwr run`
accepts only flat settings, or a line of overrides, `overrides`.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.system import expand
from fedsgcg.common.names import printable
from fedsgcg.common.settings.build import build
from fedsgcg.common.settings.choices import (
    BASES,
    CLASSES,
    CONFIGS,
    GROUPS,
    PACKAGES,
    OwnFile,
    choices_of,
    hydra_name,
    is_file,
    is_import_path,
    offered,
    own_files,
    unquoted,
)
from fedsgcg.common.settings.defaults import typed_defaults
from fedsgcg.common.settings.hints import meant, nearest, wrong_choice
from fedsgcg.common.settings.resolve import resolve_domains, resolve_own_code

__all__ = ["GROUPS", "build", "choices_of", "compose", "join", "nearest"]

# Folders and names are taken verbatim, including blanks, commas, brackets and equals signs.
FOLDERS = ("data.root", "output", "site.home", "site.cache", "config_dir")
LITERAL = (*FOLDERS, "ray.address", "run", "heldout")
# Lists of hospital names: Hydra's grammar would read 1_000 and 1.10 as numbers and null as no
# value.
NAMES = ("data.sites", "observers", "unlabelled")
# Maps with the user's own names: one on the command line replaces that of the data set instead of
# being merged with it.
MAPS = (
    *("data.classes", "data.structures", "federation.limits", "grid"),
    *("method.options", "network.options"),
)
TYPED_DEFAULTS = "typed_defaults"  # name of the first entry of `configs/run.yaml`
INSIDE_MAPS = tuple(f"{name}." for name in MAPS)


def join(
    overrides: Sequence[str] = (), run_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Join YAML files, the command line and Flower's run config into one resolved tree.

    Args:
        overrides: Hydra overrides, e.g. `["method=source", "federation.rounds=3"]`.
        run_config: Flower's flat run config. Its `config-json` replaces the YAML files; its
            `overrides` come before the argument `overrides`.

    Raises:
        FedsgcgError: CFG-001 with every unknown setting and the nearest known one, and every
            setting given twice. CFG-011 for a class by import path that cannot be used.
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
    from_flower = _split(str(run_config.get("overrides", "")))
    if local := [text for text in from_flower if _is_local(text)]:
        raise FedsgcgError(*(_local_problem(text) for text in local))
    given = [*from_flower, *overrides]
    if twice := list(_given_twice(given)):
        raise FedsgcgError(*twice, *_problems_of(given, _own_files(given)))
    return compose(given)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose `configs/run.yaml` with Hydra, after checking that every override exists.

    The last value of a setting wins. The values of `LITERAL`, `NAMES` and `MAPS` are not merged by
    Hydra; those of `LITERAL` and `NAMES` are not parsed by its grammar either.

    Raises:
        FedsgcgError: CFG-001 with every override and every own file that cannot be used.
    """
    own = _own_files(overrides)
    if problems := _problems_of(overrides, own):
        raise FedsgcgError(*problems)
    tree = _composed_or_fail(_all_for_hydra(overrides), own)
    if problems := _unknown_in_files(tree, own):
        raise FedsgcgError(*problems)
    for text in overrides:
        if _bypasses_hydra(text):
            key, _, value = text.partition("=")
            _set(tree, f"{key}.name" if key in CLASSES else key, _direct_value(key, value))
    resolve_own_code(tree)
    resolve_domains(tree)
    return tree


def chosen(overrides: Sequence[str]) -> dict[str, str]:
    """Return the choice of each group after all overrides."""
    own = _own_files(overrides)
    plain = _all_for_hydra(overrides)
    choices = _hydra_config(tuple(plain), own).hydra.runtime.choices
    return {group: str(choices[group] or "") for group in GROUPS}


def own_choices(overrides: Sequence[str]) -> tuple[OwnFile, ...]:
    """Return the user's own files that overrides refer to, for `choices_of`."""
    return _own_files(overrides)


def _own_files(overrides: Sequence[str]) -> tuple[OwnFile, ...]:
    """Read the user's own files: those of the folder `config_dir`, and those given by path."""
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
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name=TYPED_DEFAULTS, node=typed_defaults())
    with offered(own), initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose("run", list(overrides), return_hydra_config=True)


def _composed(overrides: Sequence[str], own: tuple[OwnFile, ...]) -> dict[str, Any]:
    from omegaconf import OmegaConf, open_dict

    composed = _hydra_config(overrides, own)
    with open_dict(composed):
        del composed["hydra"]
    return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))


def _composed_or_fail(overrides: Sequence[str], own: tuple[OwnFile, ...]) -> dict[str, Any]:
    """Compose; an error of Hydra is reported with the override or the file that causes it."""
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
    """Return the sorted names of all settings and sections, except the entries of `MAPS`."""
    return tuple(
        sorted(name for name in _flatten(_composed([], ())) if not name.startswith(INSIDE_MAPS))
    )


@functools.cache
def data_defaults() -> Mapping[str, Any]:
    """Return the values from which every data set starts, the user's own included.

    The default data set, `synthetic`, has its own values of some of them.
    """
    return cast("dict[str, Any]", _composed(["data=_base"], ())["data"])


def _unknown_in_files(tree: Mapping[str, Any], own: tuple[OwnFile, ...]) -> list[Problem]:
    """Return a problem for every unknown setting in own files, which Hydra would accept."""
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
    """Return a value without enclosing quotes, and with `~` of a folder expanded."""
    value = unquoted(value)
    return str(expand(value, key)) if value and key in FOLDERS else value


def _is_literal(text: str) -> bool:
    """Whether an override's value is taken verbatim; an invalid list of names is left to Hydra."""
    key, _, value = text.partition("=")
    return key in LITERAL or (key in NAMES and _names(value) is not None)


def _bypasses_hydra(text: str) -> bool:
    """Whether an override's value is set in the composed tree instead of being merged by Hydra."""
    return _is_literal(text) or _key(text) in MAPS or _is_class(text)


def _is_class(text: str) -> bool:
    """Whether an override is a method or network by import path: `method=package.module:Class`."""
    key, _, value = text.partition("=")
    return key in CLASSES and is_import_path(value)


def _is_local(text: str) -> bool:
    """Whether an override refers to files or code of the machine that resolves it."""
    key, _, value = text.partition("=")
    own_file = key in GROUPS and is_file(unquoted(value))
    return key == "config_dir" or is_import_path(value) or own_file


def _local_problem(text: str) -> Problem:
    """Return the problem of an override that each hospital would resolve with its own files."""
    action = "start the run with `fedsgcg`, which sends the resolved settings (config-json)"
    expected = "settings that are the same on every machine"
    return Problem("CFG-001", where="overrides", found=text, expected=expected, action=action)


def _all_for_hydra(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that Hydra composes; a class starts from the base of its group."""
    classes = [_key(text) for text in overrides if _is_class(text)]
    return [
        *(_for_hydra(text) for text in overrides if not _bypasses_hydra(text)),
        *(f"{group}={BASES[group]}" for group in classes),
    ]


def _for_hydra(text: str) -> str:
    """Return an override for Hydra: an own file by its name in Hydra's store."""
    key, _, value = text.partition("=")
    if key in GROUPS and is_file(unquoted(value)):
        return f"{key}={hydra_name(unquoted(value))}"
    return text


def _direct_value(key: str, value: str) -> Any:
    """Return the value of an override that bypasses Hydra."""
    if key in CLASSES:
        return value
    if key in MAPS:
        return _parsed(f"{key}={value}")
    return _names(value) if key in NAMES else _literal(key, value)


def _parsed(text: str) -> Any:
    """Return the value of an override in Hydra's grammar as plain Python values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    value = OverridesParser.create().parse_override(text).value()
    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]  # type: ignore[index, call-overload]


def _names(text: str) -> list[str] | None:
    """Return the names in `[A, "B, C", 010]` verbatim, or None if the text is not such a list."""
    inner = re.fullmatch(r"\s*\[(.*)\]\s*", text)
    if inner is None:
        return None
    quoted = r'"((?:[^"\\]|\\.)*)"' + r"|'((?:[^'\\]|\\.)*)'"
    item = re.compile(rf"\s*(?:{quoted}|([^,'\"\[\]{{}}]+?))\s*(,|$)")
    names: list[str] = []
    rest = inner[1]
    place = 0
    while place < len(rest):
        found = item.match(rest, place)
        if found is None:
            return None
        double, single, plain = found.group(1, 2, 3)
        if plain is not None:
            names.append(plain)
        else:
            names.append(re.sub(r"\\(.)", r"\1", single if double is None else double))
        place = found.end()
    return None if rest.rstrip().endswith(",") else names


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[name] = value


def _split(line: str) -> list[str]:
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


def _problems_of(overrides: Sequence[str], own: tuple[OwnFile, ...]) -> list[Problem]:
    """Return all problems of the overrides that do not depend on the type of a setting."""
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
        elif group := _group_of_section(key, value, own):
            action = f"write {group}={value}"
            problems.append(
                Problem("CFG-001", found=text, expected="names and values", action=action)
            )
        elif key not in GROUPS:
            named.append(text)
        elif value not in choices and not is_file(unquoted(value)) and not _is_class(text):
            action = wrong_choice(key, value, choices)
            problems.append(
                Problem("CFG-001", found=text, expected=" | ".join(choices), action=action)
            )
    known = known_settings()
    for text in named:
        inside = _key(text).startswith(INSIDE_MAPS)
        maps = [
            other
            for other in named
            if inside and _key(other) in MAPS and _key(text).startswith(_key(other) + ".")
        ]
        if maps:
            problems.append(
                Problem(
                    "CFG-001",
                    where=_key(text),
                    found=f"{maps[0]} and {text}",
                    expected="one of them",
                    action="put the entry into the map",
                )
            )
            continue
        if _key(text) not in known and not (inside and _is_inside_a_map(text, overrides, own)):
            problems.append(_unknown(_key(text), known))
        elif not _is_literal(text) and not _is_one_value(text):
            problems.append(_unreadable(text))
        problems += _repeated_names(text)
    return problems


def _group_of_section(key: str, value: str, own: tuple[OwnFile, ...]) -> str:
    """Return the group of a choice that was given to the section that its files set, or ""."""
    groups = [group for group, section in PACKAGES.items() if section == key]
    return next((group for group in groups if value in choices_of(group, own)), "")


def _is_inside_a_map(text: str, overrides: Sequence[str], own: tuple[OwnFile, ...]) -> bool:
    """Whether an override is an entry of a map of the chosen groups, e.g. `data.classes.gland`."""
    groups = [
        _for_hydra(other)
        for other in overrides
        if _key(other) in GROUPS and not _is_wrong_choice(other, own)
    ]
    return _key(text) in set(_flatten(_composed_or_fail(groups, own)))


def _is_wrong_choice(text: str, own: tuple[OwnFile, ...]) -> bool:
    """Whether an override is neither a choice nor a file (classes have no maps)."""
    key, _, value = text.partition("=")
    return value not in choices_of(key, own) and not is_file(unquoted(value))


def _added_or_removed(text: str) -> Problem:
    """Return the problem of `+name=value`, `++name=value` or `~name`, which are not supported."""
    sign = text[: len(text) - len(text.lstrip("+~"))]
    plain = text.lstrip("+~")
    key = _key(plain)
    known = known_settings()
    if key not in known and key not in GROUPS:
        return _unknown(key, known)
    if sign == "~":
        expected = "name=value: a setting cannot be removed"
        action = f"give it a value, {key}=VALUE, or omit it to use the default"
    else:
        expected = "name=value: every setting exists already"
        action = f"write {plain}"
    return Problem("CFG-001", found=text, expected=expected, action=action)


def _repeated_names(text: str) -> Iterator[Problem]:
    """Yield a problem for every repeated name in braces, of which Hydra would keep the last."""
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
                yield Problem(
                    "CFG-001",
                    where=key,
                    found=f"{name} twice in {value}",
                    expected="each name once",
                    action="leave one of them out",
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
    """Return the problem of an unknown setting, with the one that was probably meant."""
    return Problem(
        "CFG-001",
        found=f"unknown setting {key!r}",
        expected="a known setting",
        action=meant(key, known),
        where=where,
    )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
