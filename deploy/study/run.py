"""A study: hospitals left out x variants x seeds, each cell one federation, as many at once as the machine allows.

A study's folder is its state. A second call with the same settings finds the same folder and runs only the cells that
are missing; a cell that was cut off goes on from its last done round.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from clients.data.case_files import resolve_cache, survey
from clients.data.store import data_fingerprint
from common.console import Screen, catch_signals, steps_of
from common.errors import FedsgcgError, Problem, fail
from common.settings.choices import is_file, unquoted
from common.settings.compose import chosen, join
from common.settings.plan import Plan
from common.settings.training import TRAITS
from deploy.study.cleaning import RESUME, finished_cells, remove
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
from deploy.study.lost_workers import as_lost
from deploy.study.preflight import (
    Machine,
    check_device,
    check_folder,
    check_plan,
    locate_hospitals,
    look_at_machine,
)
from deploy.study.progress import Progress
from deploy.study.record import add_choices, check_same_study, collect, write_record
from deploy.study.runtimes import (
    Cell,
    choose_runtime,
    gpu_share,
    prepare_environment,
    quiet_flower,
    ray_arguments,
    run_cell_in_process,
    run_cell_on_ray,
)
from deploy.study.selection import Candidate, Choice, choose, chosen_cell, describe_selection, inner_cells
from server.records.journal import lock_file

RAY_ANSWERS_WITHIN_S = 5.0
# Places and machines: changing them does not make another study.
NOT_IDENTITY = (
    *("method", "heldout", "seed", "run", "output", "device", "runtime", "ray", "site", "grid", "select"),
    "config_dir",
)


@dataclass(frozen=True)
class Study:
    """What was asked, resolved.

    Attributes:
        folder: The study's folder.
        cells: Its federations, in the order in which they are started.
        runtime: `ray` or `inprocess`.
        device: `cpu` or `cuda`.
        machine: What this machine offers.
        ray_address: `local`, `auto` or `host:port`.
        overrides: The command line, for the record.
        command: `study` or `simulate`, for the record.
        data: Fingerprint of the hospitals' files (`clients.data.store.data_fingerprint`).
        candidates: Name of a cell -> what its fold chooses between, with the federations that judge it.
        selection: How settings were chosen, in words.
        shared: Settings that all its cells have in common, whatever else is added to it (`shared_settings`).
    """

    folder: Path
    cells: tuple[Cell, ...]
    runtime: str
    device: str
    machine: Machine
    ray_address: str
    overrides: tuple[str, ...]
    command: str
    data: str
    candidates: Mapping[str, tuple[Candidate, ...]] = field(default_factory=dict)
    selection: str = ""
    shared: Mapping[str, Any] = field(default_factory=dict)


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
        (variant.label, settings): _tree_of(replace(variant, settings=(*variant.settings, *settings)), rest, located)
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
    inner = [cell for found in candidates.values() for candidate in found for cell in candidate.inner]
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
    data = _fingerprint(Plan.from_tree({**cells[0].tree, "data": located["data"]}))  # a cell may hold few hospitals
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


def run_study(study: Study, console: Screen) -> int:
    """Run what is missing, then write the tables and the report; returns the exit code (0, 1 failed, 3 degraded)."""
    from server.report.build import make_report

    check_folder(study.folder)
    with lock_file(study.folder / "lock"):
        check_same_study(study)
        write_record(study)
        missing = [cell for cell in study.cells if not cell.done]
        console.print(
            Text.assemble((f"{len(study.cells)} cells", "bold"), f", {len(missing)} to do, in {study.folder}")
        )
        console.print(_explain_runtime(study, len(missing)))
        _tell_survey(study, console)
        _tell_nobody_held_out(study, console)
        ended = Ended()
        if missing:
            missing, ended = _select(study, missing, console)
            with Progress(study.cells, console):
                ended = ended.and_then(_run_cells(study, missing)) if missing else ended
        for folder in finished_cells(study.folder):
            remove(folder, RESUME)
        with steps_of(console, "making the report") as tell:
            collect(study.folder)
            make_report(study.folder, tell)
    _tell_cut_steps(missing, console)
    for name, text in ended.retried.items():
        console.print(f"{name} lost its worker ({text}) and was run again from its last done round.", style="yellow")
    for name, text in ended.errors.items():
        console.print(f"{name} failed", style="bold red")
        console.print(text)
    return exit_code(study.cells)


def _select(study: Study, missing: Sequence[Cell], console: Screen) -> tuple[list[Cell], Ended]:
    """Let each fold's source hospitals choose its settings; returns the cells that can run now, with what they chose.

    Inner cells are resumed like any other; where one failed, its fold's own cell waits for the next call.
    """
    waiting = {cell.name: study.candidates[cell.name] for cell in missing if cell.name in study.candidates}
    inner = [cell for found in waiting.values() for candidate in found for cell in candidate.inner]
    open_cells = [cell for cell in inner if not cell.done]
    if not inner:
        return list(missing), Ended()
    ended = Ended()
    if open_cells:
        console.print(f"choosing {len(waiting)} settings: {len(open_cells)} of {len(inner)} inner cells to do")
        with Progress(inner, console):
            ended = _run_cells(study, open_cells)
    ready: list[Cell] = []
    choices: dict[tuple[str, str, int], Choice] = {}
    for cell in missing:
        found = waiting.get(cell.name, ())
        if not all(part.done for candidate in found for part in candidate.inner):
            ended.errors[cell.name] = "Not run: an inner cell that chooses its setting has failed."
            continue
        try:
            choice = choose(found) if found else None
        except FedsgcgError as error:
            ended.errors[cell.name] = describe(error)
            continue
        if choice is not None:
            choices[cell.method, cell.heldout, cell.seed] = choice
            told = ", ".join(f"{name}: {score:.3f}" for name, score in choice.scores.items())
            console.print(f"{cell.name}: {choice.settings} is chosen (mean Dice at the sources left out: {told})")
        ready.append(cell if choice is None else chosen_cell(cell, found, choice))
    add_choices(study.folder, choices)
    return ready, ended


def _tell_survey(study: Study, console: Screen) -> None:
    """Say which files of the data folder are not used, and which hospitals look like one."""
    data = study.cells[0].tree["data"]
    sites = sorted({site for cell in study.cells for site in cell.tree["data"]["sites"]})
    for problem in survey(Path(data["root"]), sites):
        console.print(str(problem), style="yellow")


def _tell_nobody_held_out(study: Study, console: Screen) -> None:
    """Say before the start that a study judges its models at hospitals that trained them."""
    if any(not cell.heldout for cell in study.cells):
        text = "No hospital is held out: models are judged on validation cases of the hospitals that trained them."
        console.print(f"{text} heldout=all leaves out every hospital in turn.", style="yellow")


def _tell_cut_steps(cells: Iterable[Cell], console: Screen) -> None:
    """Name the cells in which a hospital ran out of memory and went on with smaller parts of its steps."""
    from server.report.reader import Reader
    from server.report.rounds import cut_steps

    for cell in cells:
        if text := cut_steps(Reader(cell.folder).rows(cell.folder / "rounds.parquet", ("metric", "site", "value"))):
            console.print(f"{cell.name}: {text}.", style="yellow")


def exit_code(cells: Iterable[Cell]) -> int:
    """0 when every cell completed, 3 when one is degraded, 1 when one failed or never ended."""
    states = {cell.outcome().get("status", "failed") for cell in cells}
    return 1 if states - {"completed", "degraded"} else 3 if "degraded" in states else 0


def identity(tree: Mapping[str, Any]) -> str:
    """Hash of the settings that make two calls the same study: everything but the axes, places and machines."""
    return hashlib.sha256(json.dumps(_identifying(tree), sort_keys=True).encode()).hexdigest()


def shared_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make two calls the same study, wherever its data are."""
    kept = _identifying(tree)
    data = {name: value for name, value in kept["data"].items() if name != "root"}
    found: dict[str, Any] = json.loads(json.dumps(kept | {"data": data}))
    return found


def _identifying(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in tree.items() if name not in NOT_IDENTITY}
    kept["federation"] = {
        name: value for name, value in tree["federation"].items() if name not in ("ownership", "moments")
    }
    return kept


@dataclass
class Ended:
    """How cells ended that did not simply complete.

    Attributes:
        errors: Name of a failed cell -> what to say about it.
        retried: Name of a cell that lost its worker the first time -> how.
    """

    errors: dict[str, str] = field(default_factory=dict)
    retried: dict[str, str] = field(default_factory=dict)

    def and_then(self, later: Ended) -> Ended:
        """Return how these cells and later ones ended."""
        return Ended(self.errors | later.errors, self.retried | later.retried)


def _run_cells(study: Study, cells: Sequence[Cell]) -> Ended:
    """Run cells; one that lost its worker (RND-410) is resumed once, after the others and in a new Ray."""
    apart = study.runtime == "inprocess" and (len(cells) > 1 or study.ray_address != "local")
    failures = _run_once(study, cells, apart=apart)
    found = {cell.name: as_lost(failures[cell.name]) for cell in cells if cell.name in failures}
    lost = {name: error.problems[0].found for name, error in found.items() if error is not None}
    if lost:
        again = _run_once(study, [cell for cell in cells if cell.name in lost], apart=apart)
        failures = {name: error for name, error in failures.items() if name not in lost} | again
    return Ended({name: describe(error) for name, error in failures.items()}, lost)


def _run_once(study: Study, cells: Sequence[Cell], *, apart: bool) -> dict[str, BaseException]:
    """Run cells, in processes of Ray or (not `apart`) one after the other; one's failure never stops the others."""
    prepare_environment()
    if apart:
        return _run_in_parallel(study, cells)
    errors: dict[str, BaseException] = {}
    for cell in cells:
        try:
            if study.runtime == "ray":
                run_cell_on_ray(cell.tree, study.machine, study.ray_address)
            else:
                run_cell_in_process(cell.tree)
        except Exception as error:  # reported by the caller, with the other cells' results
            errors[cell.name] = error
    return errors


def _run_in_parallel(study: Study, cells: Sequence[Cell]) -> dict[str, BaseException]:
    """Run each cell as one Ray task."""
    import ray

    quiet_flower()
    ray.init(**ray_arguments(study.machine, study.ray_address))
    catch_signals()  # Ray has put a handler of SIGTERM in the place of ours
    try:
        threads = int(cells[0].tree["site"]["threads"])
        whole = ray.cluster_resources()  # type: ignore[no-untyped-call]  # of this machine, or of all machines of a cluster
        machine = Machine(int(whole.get("CPU", 1)), int(whole.get("GPU", 0)))
        at_once = min(len(cells), max(1, machine.cpus // threads))
        task = ray.remote(run_cell_in_process).options(
            num_cpus=threads, num_gpus=gpu_share(at_once, machine), max_retries=0
        )
        waiting = {task.remote(cell.tree): cell for cell in cells}
        errors: dict[str, BaseException] = {}
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            cell = waiting.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:  # reported by the caller, with the other cells' results
                errors[cell.name] = error
        return errors
    finally:
        ray.shutdown()


def describe(error: BaseException) -> str:
    """What a user needs of an error: the problems of ours, the trace of any other but of a lost worker."""
    lost = as_lost(error)
    if lost is not None:
        return str(lost)
    for candidate in (error, getattr(error, "cause", None), error.__cause__, error.__context__):
        if isinstance(candidate, FedsgcgError):
            return "\n".join(str(problem) for problem in candidate.problems)
    return "".join(traceback.format_exception(error))


def _cells(
    tree: Mapping[str, Any], folder: Path, variant: Variant, heldout: str, seed: int, device: str
) -> Iterator[Cell]:
    """Yield the cells of a variant at one fold and seed: one, or with `federation=local` one a training hospital."""
    if variant.federation != "local":
        yield _cell(tree, folder, variant, heldout, seed, device, "")
        return
    training = [site for site in tree["data"]["sites"] if site != heldout and site not in tree["observers"]]
    for site in training:
        data = {**tree["data"], "sites": sorted({site, heldout} - {""})}
        yield _cell({**tree, "data": data, "observers": []}, folder, variant, heldout, seed, device, site)


def _cell(
    tree: Mapping[str, Any], folder: Path, variant: Variant, heldout: str, seed: int, device: str, trained_on: str
) -> Cell:
    fold = f"{seed}-{trained_on}" if trained_on else str(seed)
    parts = (folder_name(variant.label), heldout or "all-sites", fold)
    own = {**tree, "heldout": heldout, "seed": seed, "output": str(folder.joinpath(*parts))}
    own |= {"run": "/".join((folder.name, *parts)), "label": variant.label, "setting": " ".join(variant.settings)}
    own["site"] = {**tree["site"], "device": device}
    Plan.from_tree(own)
    return Cell(variant.label, heldout, seed, own, trained_on)


def _candidates(cell: Cell, trees: Mapping[tuple[str, ...], Mapping[str, Any]], folder: Path) -> Iterator[Candidate]:
    """Yield what a cell's fold chooses between; `trees` are the variant's settings by candidate."""
    own = {name: cell.tree[name] for name in ("heldout", "seed", "output", "run", "label", "setting", "site")}
    for settings, tree in trees.items():
        whole = {**tree, **own, "data": {**tree["data"], "sites": cell.tree["data"]["sites"]}}
        whole["observers"] = cell.tree["observers"]
        text = " ".join(settings)
        yield Candidate(text, whole, inner_cells(whole, folder, cell.method, cell.heldout, text))


def _tree_of(variant: Variant, rest: Sequence[str], located: Mapping[str, Any]) -> dict[str, Any]:
    tree = join([*(text for text in rest if text.partition("=")[0] not in AXES), *variant.overrides])
    return {**tree, "data": {**tree["data"], "root": located["data"]["root"], "sites": located["data"]["sites"]}} | {
        "site": located["site"]
    }


def _alone(rest: Sequence[str], axes: Mapping[str, Sequence[str]]) -> list[str]:
    """The settings that do not vary, with the first method and federation, which others are built on."""
    groups = [f"{name}={axes[name][0]}" for name in ("method", "federation") if axes.get(name)]
    return [*rest, *groups]


def _name(tree: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """Data and experiment: two experiments on the same data are two folders, whatever cells they share."""
    experiments = [unquoted(text.partition("=")[2]) for text in overrides if text.startswith("experiment=")]
    experiments = [Path(name).stem if is_file(name) else name for name in experiments]
    return "-".join([str(tree["data"]["name"]), *(name for name in experiments if name != "none")])


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
        raise fail("CFG-007", where="ray.address", found=f"{address}: {error}", action=action) from error
    return address


def _fingerprint(plan: Plan) -> str:
    """Fingerprint of the hospitals' files, so that a run folder is never taken for a study of other images."""
    return data_fingerprint(Path(plan.data.root), plan.data.sites, plan.data, resolve_cache(plan.site))


def _runtime(name: str) -> str:
    if name not in ("auto", "ray", "inprocess"):
        raise fail("CFG-001", where="runtime", found=name, expected="auto | ray | inprocess")
    return name


def _seed(text: str) -> int:
    if not text.lstrip("-").isdigit() or int(text) < 0:
        raise fail("CFG-001", where="seed", found=text, expected="a whole number, 0 or more")
    return int(text)


def _explain_runtime(study: Study, missing: int) -> str:
    threads = int(study.cells[0].tree["site"]["threads"])
    place = f"{study.machine.cpus} CPU cores" + (f", {study.machine.gpus} GPUs" if study.machine.gpus else ", no GPU")
    if study.runtime == "ray":
        how = "hospitals in parallel: Flower's simulation engine on Ray, one cell after the other"
    else:
        at_once = max(1, min(missing, study.machine.cpus // threads))
        how = f"cells in parallel: {at_once} at once, each a federation in one process" + (
            " (Ray tasks)" if missing > 1 else ""
        )
    return f"runtime={study.runtime} ({how}), device={study.device}, {place}"
