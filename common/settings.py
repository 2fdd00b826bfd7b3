"""Settings: one function joins YAML, command line and Flower's run config; another turns the tree into typed settings.

Precedence, lowest first: `configs/run.yaml` and its groups, an `experiment`, the command line. A Flower run carries the
resolved tree in one string, `config-json` (stack.md 2.6), or a line of overrides in `overrides`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import shlex
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from common.errors import FedsgcgError, Problem, fail

if TYPE_CHECKING:
    from common.plan import Plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GROUPS = ("data", "network", "method", "federation", "prototypes", "privacy", "site", "experiment")

T = TypeVar("T")


def join(overrides: Sequence[str] = (), run_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Join YAML, command line and Flower's run config into one resolved tree.

    Args:
        overrides: Hydra overrides, e.g. `["method=source", "federation.rounds=3"]`.
        run_config: Flower's flat run config; `config-json` replaces the YAML, `overrides` is put before `overrides`.

    Raises:
        FedsgcgError: CFG-001 with every unknown setting and the nearest known one.
    """
    run_config = run_config or {}
    if text := str(run_config.get("config-json", "")):
        if overrides or run_config.get("overrides"):
            raise fail("CFG-001", found="config-json and overrides", expected="one of the two", where="run config")
        return cast("dict[str, Any]", json.loads(text))
    return compose([*shlex.split(str(run_config.get("overrides", ""))), *overrides])


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
    home = Path(os.environ.get("FEDSGCG_HOME") or Path.home() / ".fedsgcg")
    return dataclasses.replace(plan, output=str(home / "runs" / str(run_id)))


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose `configs/run.yaml` with Hydra, after checking that every override names something that exists."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        problems = list(_unknown_overrides(overrides))
        choices = [text for text in overrides if text.partition("=")[0].lstrip("+") in GROUPS]
        try:
            if not problems:
                base = OmegaConf.to_container(hydra_compose("run", choices))
                problems += _unknown_keys(overrides, cast("dict[str, Any]", base))
            if problems:
                raise FedsgcgError(*problems)
            composed = hydra_compose("run", list(overrides))
            return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
        except (HydraException, OmegaConfBaseException) as error:
            raise fail(
                "CFG-001", found=str(error).strip() or repr(error), expected="settings that Hydra can compose"
            ) from error


def build(cls: type[T], tree: Mapping[str, Any]) -> T:
    """Build a settings dataclass from plain dictionaries, raising one error that lists every problem."""
    problems: list[Problem] = []
    value = _convert(cls, tree, "", problems)
    if problems:
        raise FedsgcgError(*problems)
    return cast("T", value)


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint such as "did you mean x?" for an unknown word, or the list when nothing is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)[:30])}"


def choices_of(group: str) -> list[str]:
    """Names that a group offers, e.g. `choices_of("data")`."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml") if not path.stem.startswith("_"))


def _unknown_overrides(overrides: Sequence[str]) -> Iterator[Problem]:
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            yield Problem("CFG-001", found=text, expected="name=value", where="command line")
        elif key in GROUPS and value not in choices_of(key):
            yield Problem(
                "CFG-001",
                found=f"{key}={value}",
                expected=" | ".join(choices_of(key)),
                action=nearest(value, choices_of(key)),
            )


def _unknown_keys(overrides: Sequence[str], tree: Mapping[str, Any]) -> list[Problem]:
    known = sorted(_flatten(tree))
    # A user who writes `rounds` means `federation.rounds`: the last part of a name is a way to call it.
    full_names = {name.rpartition(".")[2]: name for name in reversed(known)} | {
        name: name for name in [*known, *GROUPS]
    }
    problems = []
    for text in overrides:
        key = text.partition("=")[0]
        if key in GROUPS or key.startswith(("+", "~")) or key in known:
            continue
        close = difflib.get_close_matches(key, list(full_names), n=1, cutoff=0.5)
        close = close or difflib.get_close_matches(key.rpartition(".")[2], list(full_names), n=1, cutoff=0.5)
        hint = f"did you mean {full_names[close[0]]!r}?" if close else "see `fedsgcg settings`"
        problems.append(Problem("CFG-001", found=f"unknown setting {key!r}", expected="a known setting", action=hint))
    return problems


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
        return value
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
        return str(value)  # YAML reads a hospital called 12 as a number
    if kind in (int, bool) and type(value) is kind:
        return value
    expected = (
        " | ".join(str(item) for item in arguments) if origin is Literal else getattr(kind, "__name__", str(kind))
    )
    problems.append(Problem("CFG-001", where=path, found=repr(value), expected=expected))
    return None


def _convert_section(kind: type, value: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(Problem("CFG-001", where=path, found=repr(value), expected=f"settings of {kind.__name__}"))
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
