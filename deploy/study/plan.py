"""Turn settings into the cells of a study, and report every problem before anything starts."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsgcg.clients.data.case_files import resolve_cache
from fedsgcg.clients.data.store import data_fingerprint
from fedsgcg.common.console import silent
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.build import build
from fedsgcg.common.settings.choices import is_file, unquoted
from fedsgcg.common.settings.compose import chosen, join
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.run import RunSettings
from fedsgcg.common.settings.training import TRAITS
from fedsgcg.deploy.study.budget import budgeted
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.classmap import check_classes
from fedsgcg.deploy.study.grid import (
    AXES,
    Variant,
    candidates_of,
    split_axes,
    split_select,
    split_selected,
    variants,
    with_grid,
)
from fedsgcg.deploy.study.planned import Planner
from fedsgcg.deploy.study.preflight import (
    check_device,
    check_plan,
    inspect_machine,
    locate_hospitals,
)
from fedsgcg.deploy.study.references import BEST, check_references, reference_variants
from fedsgcg.deploy.study.runtimes import choose_runtime
from fedsgcg.deploy.study.selection import Candidate, describe_selection, inner_cells
from fedsgcg.deploy.study.shard import Shard
from fedsgcg.deploy.study.study import Study, identity, shared_settings

RAY_ANSWERS_WITHIN_S = 5.0


def plan_study(
    overrides: Sequence[str], *, single: bool = False, step: Callable[[str], None] = silent
) -> Study:
    """Turn a command line into a study, with all checks that are possible before the start.

    Args:
        overrides: Settings as `name=value`; one with commas varies (`deploy.study.grid`), and
            `heldout=all` holds out every site in turn.
        single: More than one cell is an error (`fedsgcg simulate`).
        step: Called with what is being checked.
    """
    given, names = split_select(overrides)
    values, rest = split_axes(given)
    experiment = join(_without_axes(rest, values))
    axes = with_grid(values, experiment["grid"], rest)
    axes, selected = split_selected(axes, experiment["select"] if names is None else names)
    base = join(_without_axes(rest, axes))
    located = locate_hospitals(base)
    sites: list[str] = located["data"]["sites"]
    heldouts = [item.strip("'\"") for item in axes.get("heldout", [])] or [str(base["heldout"])]
    if heldouts == ["all"]:
        heldouts = sites
    seeds = [_seed(text) for text in axes.get("seed") or [str(base["seed"])]]
    choices = chosen(_without_axes(rest, axes))
    traits = _traits(rest, axes.get("method") or [choices["method"]])
    compared = variants(axes, choices["method"], choices["federation"], traits)
    references = _run_settings(base).references
    trained = {name: _sources(located, name) for name in heldouts}
    check_references(references, trained)
    known = {variant.label for variant in compared}
    own_rows = [one for one in reference_variants(references) if one.label not in known]
    judged = BEST in references
    machine = inspect_machine(int(base["ray"]["cpus"]))
    device = check_device(str(base["device"]), machine)
    complete = located | ({"selected": selected} if selected else {})
    default = f"runs/{_name(base, overrides)}-{identity(complete)[:8]}"
    folder = Path(str(base["output"]) or default).resolve()
    cells: list[Cell] = []
    candidates: dict[str, tuple[Candidate, ...]] = {}
    named = frozenset(text.lstrip("+").partition("=")[0] for text in rest)
    planner = Planner(resolve_cache(Plan.from_tree(located).site), named, step)
    trees = {
        (variant.label, settings): _tree_of(
            replace(variant, settings=(*variant.settings, *settings)), rest, located, device
        )
        for variant in (*compared, *own_rows)
        for settings in candidates_of(variant, selected) or [()]
    }
    for seed, heldout, variant in itertools.product(seeds, heldouts, (*compared, *own_rows)):
        combinations = candidates_of(variant, selected)
        first = combinations[0] if combinations else ()
        planned = {
            settings: planner.tree(
                trees[variant.label, settings], heldout, (*variant.settings, *settings)
            )
            for settings in combinations or [()]
        }
        made = list(_cells(planned[first], folder, variant, heldout, seed, judged=judged))
        cells += made
        if combinations:
            for cell in made:
                candidates[cell.name] = tuple(_candidates(cell, planned, folder))
    inner = [
        cell for found in candidates.values() for candidate in found for cell in candidate.inner
    ]
    count = len(cells) + len(inner)
    if single and count > 1:
        found = f"{count} cells: several methods, hospitals, seeds or settings"
        raise fail("CFG-001", found=found, expected="one of each", action="use `fedsgcg study`")
    _check_cells([*cells, *inner], device)
    check_classes([Plan.from_tree(cell.tree) for cell in cells if not cell.done], step)
    swept = [name for name in axes if name not in AXES]
    shard = Shard.parse(str(base["shard"]), len(cells))
    part = cells if shard is None else shard.part(cells)
    contrasts = any("contrasts" in variant.traits for variant in compared)
    return Study(
        folder=folder,
        cells=tuple(part),
        runtime=choose_runtime(_runtime(str(base["runtime"]), shard), count, machine),
        device=device,
        machine=machine,
        ray_address=_ray_address(str(base["ray"]["address"])),
        overrides=tuple(overrides),
        command="simulate" if single else "study",
        # The data of all sites: a single cell may contain only some of them.
        data=_fingerprint(Plan.from_tree({**cells[0].tree, "data": located["data"]})),
        candidates={cell.name: candidates[cell.name] for cell in part if cell.name in candidates},
        selection=describe_selection(list(selected), swept, contrasts=contrasts),
        shared=shared_settings(complete),
        telemetry=_run_settings(base).telemetry,
        tracking=_run_settings(base).tracking,
        mlflow_uri=_run_settings(base).mlflow_uri,
        references=references,
        plans=tuple(planner.plans.values()),
        shard=shard,
    )


def _run_settings(tree: Mapping[str, Any]) -> RunSettings:
    return build(RunSettings, {name: tree[name] for name in RunSettings.__dataclass_fields__})


def _cells(
    tree: Mapping[str, Any],
    folder: Path,
    variant: Variant,
    heldout: str,
    seed: int,
    *,
    judged: bool = False,
) -> Iterator[Cell]:
    """Yield the cells of a variant for one fold and seed.

    There is one cell, or with `federation=local` one for each training site. With `judged` the
    other training sites evaluate its model, for the reference `best_single`.
    """
    hospitals = _hospitals(tree)
    if variant.federation != "local":
        own = budgeted({**tree, "heldout": heldout}, hospitals)
        yield make_cell(own, folder, variant, heldout, seed)
        return
    training = _sources(tree, heldout)
    for site in training:
        others = [name for name in training if name != site] if judged else []
        data = {**tree["data"], "sites": sorted({site, heldout, *others} - {""})}
        own = {**tree, "data": data, "heldout": heldout, "observers": others, "unlabelled": []}
        yield make_cell(budgeted(own, hospitals), folder, variant, heldout, seed, site)


def _sources(tree: Mapping[str, Any], heldout: str) -> list[str]:
    """Return the hospitals that train with their masks when one is held out."""
    apart = (heldout, *tree["observers"], *tree["unlabelled"])
    return [site for site in tree["data"]["sites"] if site not in apart]


def _hospitals(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hospitals of a study by role, for `deploy.study.budget`."""
    roles = {name: tree[name] for name in ("observers", "unlabelled")}
    return {"sites": tree["data"]["sites"], **roles}


def make_cell(
    tree: Mapping[str, Any],
    folder: Path,
    variant: Variant,
    heldout: str,
    seed: int,
    trained_on: str = "",
) -> Cell:
    """Return the cell of a variant for one fold and seed.

    Args:
        tree: Resolved settings of the variant.
        folder: Folder of the study.
        variant: Method and varied settings.
        heldout: Held-out site, "" for none.
        seed: Seed.
        trained_on: The single training site with `federation=local`, else "".

    Raises:
        FedsgcgError: CFG-00x for settings that contradict each other.
    """
    path = paths.cell_path(variant.label, heldout, seed, trained_on)
    own = {
        **tree,
        "heldout": heldout,
        "seed": seed,
        "output": str(folder / path),
        "run": f"{folder.name}/{path.as_posix()}",
        "label": variant.label,
        "setting": " ".join(variant.settings),
    }
    Plan.from_tree(own)
    return Cell(variant.label, heldout, seed, own, trained_on)


def _candidates(
    cell: Cell, trees: Mapping[tuple[str, ...], Mapping[str, Any]], folder: Path
) -> Iterator[Candidate]:
    """Yield the candidates of a cell's fold; `trees` are the variant's settings by candidate."""
    own = {
        name: cell.tree[name]
        for name in ("heldout", "seed", "output", "run", "label", "setting", "site")
    }
    for settings, tree in trees.items():
        data = {**tree["data"], "sites": cell.tree["data"]["sites"]}
        merged = {**tree, **own, "data": data, "observers": cell.tree["observers"]}
        merged["unlabelled"] = cell.tree["unlabelled"]
        merged = budgeted(merged, _hospitals(merged))
        text = " ".join(settings)
        yield Candidate(text, merged, inner_cells(merged, folder, cell.method, cell.heldout, text))


def _tree_of(
    variant: Variant, rest: Sequence[str], located: Mapping[str, Any], device: str
) -> dict[str, Any]:
    fixed = [text for text in rest if text.partition("=")[0] not in AXES]
    tree = join([*fixed, *variant.overrides])
    data = {
        **tree["data"],
        "root": located["data"]["root"],
        "sites": located["data"]["sites"],
    }
    return {**tree, "data": data, "site": {**located["site"], "device": device}}


def _without_axes(rest: Sequence[str], axes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the settings that do not vary, with the first method and federation of the axes."""
    groups = [f"{name}={axes[name][0]}" for name in ("method", "federation") if axes.get(name)]
    return [*rest, *groups]


def _name(tree: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """Return the names of data and experiment; experiments on the same data have own folders."""
    experiments = [
        unquoted(text.partition("=")[2]) for text in overrides if text.startswith("experiment=")
    ]
    experiments = [Path(name).stem if is_file(name) else name for name in experiments]
    return "-".join([str(tree["data"]["name"]), *experiments])


def _traits(rest: Sequence[str], methods: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the traits of each method, including a user's own files and classes."""
    found = {}
    for choice in methods:
        method = join([*rest, f"method={choice}"])["method"]
        found[choice] = TRAITS.get(method["name"], frozenset(method["traits"]))
    return found


def _check_cells(cells: Sequence[Cell], device: str) -> None:
    """Raise one error with the problems of all cells."""
    problems: dict[Problem, None] = {}
    for cell in cells:
        try:
            check_plan(Plan.from_tree(cell.tree), device)
        except FedsgcgError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise FedsgcgError(*problems)


def _ray_address(address: str) -> str:
    """Return `local`, `auto` or a `host:port` that answers; Ray itself would try for minutes."""
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
    """Return the fingerprint of the sites' files, which detects a run folder of other images."""
    root = Path(plan.data.root)
    hidden = [site for site in plan.data.sites if plan.hides_masks(site)]
    return data_fingerprint(root, plan.data.sites, plan.data, resolve_cache(plan.site), hidden)


def _runtime(name: str, shard: Shard | None) -> str:
    if name not in ("auto", "ray", "inprocess"):
        raise fail("CFG-001", where="runtime", found=name, expected="auto | ray | inprocess")
    if shard is None:
        return name
    if name == "ray":
        expected = "auto or inprocess with shard=K/N: a shard's cells run in its own process"
        raise fail("CFG-001", where="runtime", found=name, expected=expected)
    return "inprocess"


def _seed(text: str) -> int:
    if not text.lstrip("-").isdigit() or int(text) < 0:
        raise fail("CFG-001", where="seed", found=text, expected="a whole number, 0 or more")
    return int(text)
