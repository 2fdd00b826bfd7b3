"""From settings to the cells of a study, with everything that is wrong before anything starts."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clients.data.case_files import resolve_cache
from clients.data.store import data_fingerprint
from common.errors import FedsgcgError, Problem, fail
from common.settings.choices import is_file, unquoted
from common.settings.compose import chosen, join
from common.settings.plan import Plan
from common.settings.training import TRAITS
from deploy.study.cell import Cell
from deploy.study.grid import (
    AXES,
    Variant,
    candidates_of,
    folder_name,
    split_axes,
    split_select,
    split_selected,
    variants,
    with_grid,
)
from deploy.study.preflight import check_device, check_plan, locate_hospitals, look_at_machine
from deploy.study.runtimes import choose_runtime
from deploy.study.selection import Candidate, describe_selection, inner_cells
from deploy.study.study import Study, identity, shared_settings

RAY_ANSWERS_WITHIN_S = 5.0


def plan_study(overrides: Sequence[str], *, single: bool = False) -> Study:
    """Turn a command line into a study, checking everything that can be checked before the start.

    Args:
        overrides: Settings as `name=value`; one with commas varies (`deploy.study.grid`), and `heldout=all` leaves out
            every hospital in turn.
        single: Refuse more than one cell (`fedsgcg simulate`).
    """
    given, names = split_select(overrides)
    values, rest = split_axes(given)
    experiment = join(_alone(rest, values))
    axes = with_grid(values, experiment["grid"], rest)
    axes, selected = split_selected(axes, experiment["select"] if names is None else names)
    base = join(_alone(rest, axes))
    located = locate_hospitals(base)
    sites: list[str] = located["data"]["sites"]
    heldouts = [item.strip("'\"") for item in axes.get("heldout", [])] or [str(base["heldout"])]
    heldouts = sites if heldouts == ["all"] else heldouts
    seeds = [_seed(text) for text in axes.get("seed") or [str(base["seed"])]]
    made_of = chosen(_alone(rest, axes))
    traits = _traits(rest, axes.get("method") or [made_of["method"]])
    compared = variants(axes, made_of["method"], made_of["federation"], traits)
    machine = look_at_machine(int(base["ray"]["cpus"]))
    device = check_device(str(base["device"]), machine)
    whole = located | ({"selected": selected} if selected else {})
    mark = identity(whole)[:8]
    folder = Path(str(base["output"]) or f"runs/{_name(base, overrides)}-{mark}").resolve()
    cells: list[Cell] = []
    candidates: dict[str, tuple[Candidate, ...]] = {}
    trees = {
        (variant.label, settings): _tree_of(
            replace(variant, settings=(*variant.settings, *settings)), rest, located
        )
        for variant in compared
        for settings in candidates_of(variant, selected) or [()]
    }
    for seed, heldout, variant in itertools.product(seeds, heldouts, compared):
        combinations = candidates_of(variant, selected)
        first = combinations[0] if combinations else ()
        made = list(_cells(trees[variant.label, first], folder, variant, heldout, seed, device))
        cells += made
        for cell in made if combinations else ():
            own = {settings: trees[variant.label, settings] for settings in combinations}
            candidates[cell.name] = tuple(_candidates(cell, own, folder))
    inner = [
        cell for found in candidates.values() for candidate in found for cell in candidate.inner
    ]
    if single and len(cells) + len(inner) > 1:
        found, action = (
            f"{len(cells) + len(inner)} cells: several methods, hospitals, seeds or settings",
            "use `fedsgcg study`",
        )
        raise fail("CFG-001", found=found, expected="one of each", action=action)
    _check_cells([*cells, *inner], device)
    runtime = choose_runtime(_runtime(str(base["runtime"])), len(cells) + len(inner), machine)
    command = "simulate" if single else "study"
    address = _ray_address(str(base["ray"]["address"]))
    data = _fingerprint(
        Plan.from_tree({**cells[0].tree, "data": located["data"]})
    )  # a cell may hold few hospitals
    swept = [name for name in axes if name not in AXES]
    contrasts = any("contrasts" in variant.traits for variant in compared)
    words = describe_selection(list(selected), swept, contrasts=contrasts)
    return Study(
        folder,
        tuple(cells),
        runtime,
        device,
        machine,
        address,
        tuple(overrides),
        command,
        data,
        candidates,
        words,
        shared_settings(whole),
    )


def _cells(
    tree: Mapping[str, Any], folder: Path, variant: Variant, heldout: str, seed: int, device: str
) -> Iterator[Cell]:
    """Yield the cells of a variant at one fold and seed: one, or with `federation=local` one a training hospital."""
    if variant.federation != "local":
        yield _cell(tree, folder, variant, heldout, seed, device, "")
        return
    training = [
        site for site in tree["data"]["sites"] if site != heldout and site not in tree["observers"]
    ]
    for site in training:
        data = {**tree["data"], "sites": sorted({site, heldout} - {""})}
        yield _cell(
            {**tree, "data": data, "observers": []}, folder, variant, heldout, seed, device, site
        )


def _cell(
    tree: Mapping[str, Any],
    folder: Path,
    variant: Variant,
    heldout: str,
    seed: int,
    device: str,
    trained_on: str,
) -> Cell:
    fold = f"{seed}-{trained_on}" if trained_on else str(seed)
    parts = (folder_name(variant.label), heldout or "all-sites", fold)
    own = {**tree, "heldout": heldout, "seed": seed, "output": str(folder.joinpath(*parts))}
    own |= {
        "run": "/".join((folder.name, *parts)),
        "label": variant.label,
        "setting": " ".join(variant.settings),
    }
    own["site"] = {**tree["site"], "device": device}
    Plan.from_tree(own)
    return Cell(variant.label, heldout, seed, own, trained_on)


def _candidates(
    cell: Cell, trees: Mapping[tuple[str, ...], Mapping[str, Any]], folder: Path
) -> Iterator[Candidate]:
    """Yield what a cell's fold chooses between; `trees` are the variant's settings by candidate."""
    own = {
        name: cell.tree[name]
        for name in ("heldout", "seed", "output", "run", "label", "setting", "site")
    }
    for settings, tree in trees.items():
        whole = {**tree, **own, "data": {**tree["data"], "sites": cell.tree["data"]["sites"]}}
        whole["observers"] = cell.tree["observers"]
        text = " ".join(settings)
        yield Candidate(text, whole, inner_cells(whole, folder, cell.method, cell.heldout, text))


def _tree_of(variant: Variant, rest: Sequence[str], located: Mapping[str, Any]) -> dict[str, Any]:
    tree = join(
        [*(text for text in rest if text.partition("=")[0] not in AXES), *variant.overrides]
    )
    return {
        **tree,
        "data": {
            **tree["data"],
            "root": located["data"]["root"],
            "sites": located["data"]["sites"],
        },
    } | {"site": located["site"]}


def _alone(rest: Sequence[str], axes: Mapping[str, Sequence[str]]) -> list[str]:
    """The settings that do not vary, with the first method and federation, which others are built on."""
    groups = [f"{name}={axes[name][0]}" for name in ("method", "federation") if axes.get(name)]
    return [*rest, *groups]


def _name(tree: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """Data and experiment: two experiments on the same data are two folders, whatever cells they share."""
    experiments = [
        unquoted(text.partition("=")[2]) for text in overrides if text.startswith("experiment=")
    ]
    experiments = [Path(name).stem if is_file(name) else name for name in experiments]
    return "-".join([str(tree["data"]["name"]), *experiments])


def _traits(rest: Sequence[str], methods: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return what each choice of a method does, also of an own file or class."""
    found = {}
    for choice in methods:
        method = join([*rest, f"method={choice}"])["method"]
        found[choice] = TRAITS.get(method["name"], frozenset(method["traits"]))
    return found


def _check_cells(cells: Sequence[Cell], device: str) -> None:
    """Raise one error with everything that is impossible in any of the cells."""
    problems: dict[Problem, None] = {}
    for cell in cells:
        try:
            check_plan(Plan.from_tree(cell.tree), device)
        except FedsgcgError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise FedsgcgError(*problems)


def _ray_address(address: str) -> str:
    """Return `local`, `auto` or a `host:port` that answers: Ray itself would try for minutes."""
    if address in ("local", "auto"):
        return address
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=RAY_ANSWERS_WITHIN_S).close()
    except (OSError, ValueError) as error:
        action = "start the cluster (ray start --head), or use ray.address=local"
        raise fail(
            "CFG-007", where="ray.address", found=f"{address}: {error}", action=action
        ) from error
    return address


def _fingerprint(plan: Plan) -> str:
    """Fingerprint of the hospitals' files, so that a run folder is never taken for a study of other images."""
    return data_fingerprint(
        Path(plan.data.root), plan.data.sites, plan.data, resolve_cache(plan.site)
    )


def _runtime(name: str) -> str:
    if name not in ("auto", "ray", "inprocess"):
        raise fail("CFG-001", where="runtime", found=name, expected="auto | ray | inprocess")
    return name


def _seed(text: str) -> int:
    if not text.lstrip("-").isdigit() or int(text) < 0:
        raise fail("CFG-001", where="seed", found=text, expected="a whole number, 0 or more")
    return int(text)
