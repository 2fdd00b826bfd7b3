"""A study: hospitals left out x methods x seeds, each cell one federation, as many at once as the machine allows.

A study's folder is its state. A second call with the same settings finds the same folder and runs only the cells that
are missing; a cell that was cut off goes on from its last done round.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console

from common.errors import FedsgcgError, Problem, fail
from common.plan import Plan
from common.settings import choices_of, join, nearest
from deploy.preflight import Machine, check_device, check_folder, check_heldout, locate_hospitals, look_at_machine
from deploy.progress import Progress
from deploy.simulate import (
    Cell,
    choose_runtime,
    gpu_share,
    prepare_environment,
    quiet_flower,
    ray_arguments,
    run_cell_in_process,
    run_cell_on_ray,
)
from server.disk import Disk
from server.journal import decisive_settings, differences, lock_file

AXES = ("method", "heldout", "seed")
# Places and machines: changing them does not make another study.
NOT_IDENTITY = ("method", "heldout", "seed", "run", "output", "device", "runtime", "ray", "site")


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
    """

    folder: Path
    cells: tuple[Cell, ...]
    runtime: str
    device: str
    machine: Machine
    ray_address: str
    overrides: tuple[str, ...]


def plan_study(overrides: Sequence[str], *, single: bool = False) -> Study:
    """Turn a command line into a study, checking everything that can be checked before the start.

    Args:
        overrides: Settings as `name=value`; `method`, `heldout` and `seed` take several values with commas, and
            `heldout=all` leaves out every hospital in turn.
        single: Refuse more than one cell (`fedsgcg simulate`).
    """
    values, rest = split_axes(overrides)
    base = join([*rest, *(f"method={name}" for name in values.get("method", [])[:1])])
    methods = values.get("method") or [_choice(base)]
    located = locate_hospitals(base)
    sites: list[str] = located["data"]["sites"]
    heldouts = values.get("heldout") or [str(base["heldout"])]
    heldouts = sites if heldouts == ["all"] else heldouts
    check_heldout(heldouts, sites)
    seeds = [_seed(text) for text in values.get("seed") or [str(base["seed"])]]
    if single and len(methods) * len(heldouts) * len(seeds) > 1:
        raise fail(
            "CFG-001", found="several methods, hospitals or seeds", expected="one of each", action="use `fedsgcg study`"
        )
    machine = look_at_machine(int(base["ray"]["cpus"]))
    device = check_device(str(base["device"]), machine)
    folder = Path(str(base["output"]) or f"runs/{base['data']['name']}-{identity(located)[:8]}").resolve()
    trees = {name: _for_method(rest, name, located) for name in methods}
    cells = tuple(
        _cell(trees[name], folder, name, heldout, seed, device)
        for seed in seeds
        for heldout in heldouts
        for name in methods
    )
    runtime = choose_runtime(_runtime(str(base["runtime"])), len(cells), machine)
    return Study(folder, cells, runtime, device, machine, str(base["ray"]["address"]), tuple(overrides))


def run_study(study: Study, console: Console) -> int:
    """Run what is missing, then write the tables and the report; returns the exit code (0, 1 failed, 3 degraded)."""
    from server.report import make_report

    check_folder(study.folder)
    with _locked(study.folder):
        _check_same_study(study)
        _write_record(study)
        missing = [cell for cell in study.cells if not cell.done]
        console.print(
            f"[bold]{len(study.cells)} cells[/bold], {len(missing)} to do, in {study.folder}", highlight=False
        )
        console.print(_explain_runtime(study, len(missing)), highlight=False)
        errors: dict[str, str] = {}
        if missing:
            with Progress(study.cells, console):
                errors = _run_cells(study, missing)
        with console.status("making the report"):
            collect(study.folder)
            make_report(study.folder)
    for name, text in errors.items():
        console.print(f"[bold red]{name} failed[/bold red]\n{text}", highlight=False)
    return exit_code(study.cells)


def exit_code(cells: Iterable[Cell]) -> int:
    """0 when every cell completed, 3 when one is degraded, 1 when one failed or never ended."""
    states = {cell.outcome().get("status", "failed") for cell in cells}
    return 1 if states - {"completed", "degraded"} else 3 if "degraded" in states else 0


def split_axes(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Take `method`, `heldout` and `seed` off a command line: (values by axis, the rest)."""
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if separator and key in AXES:
            items = [item.strip().strip("'\"") for item in value.strip("[]").split(",")]
            values[key] = [item for item in dict.fromkeys(items) if item or key == "heldout"]
        else:
            rest.append(text)
    unknown = [name for name in values.get("method", []) if name not in choices_of("method")]
    if unknown:
        known = choices_of("method")
        raise FedsgcgError(
            *(
                Problem("CFG-001", where="method", found=name, expected=" | ".join(known), action=nearest(name, known))
                for name in unknown
            )
        )
    return values, rest


def identity(tree: Mapping[str, Any]) -> str:
    """Hash of the settings that make two calls the same study: everything but the axes, places and machines."""
    kept = {name: value for name, value in tree.items() if name not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def collect(folder: Path) -> None:
    """Join the cells' `results.parquet` and `rounds.parquet` into the study's own."""
    disk = Disk()
    for name in ("results.parquet", "rounds.parquet"):
        tables = [pq.read_table(path) for path in sorted(folder.glob(f"*/*/*/{name}"))]
        if tables:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
            disk.write(folder / name, bytes(sink.getvalue()))


def _run_cells(study: Study, cells: Sequence[Cell]) -> dict[str, str]:
    """Run cells and return the error text of those that failed; one cell's failure never stops the others."""
    prepare_environment()
    if study.runtime == "inprocess" and (len(cells) > 1 or study.ray_address != "local"):
        return _run_in_parallel(study, cells)
    errors = {}
    for cell in cells:
        try:
            if study.runtime == "ray":
                run_cell_on_ray(cell.tree, study.machine, study.ray_address)
            else:
                run_cell_in_process(cell.tree)
        except Exception as error:  # reported by the caller, with the other cells' results
            errors[cell.name] = describe(error)
    return errors


def _run_in_parallel(study: Study, cells: Sequence[Cell]) -> dict[str, str]:
    """Run each cell as one Ray task."""
    import ray

    quiet_flower()
    ray.init(**ray_arguments(study.machine, study.ray_address))
    try:
        threads = int(cells[0].tree["site"]["threads"])
        at_once = min(len(cells), max(1, study.machine.cpus // threads))
        task = ray.remote(run_cell_in_process).options(
            num_cpus=threads, num_gpus=gpu_share(at_once, study.machine), max_retries=0
        )
        waiting = {task.remote(cell.tree): cell for cell in cells}
        errors = {}
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            cell = waiting.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:  # reported by the caller, with the other cells' results
                errors[cell.name] = describe(error)
        return errors
    finally:
        ray.shutdown()


def describe(error: BaseException) -> str:
    """What a user needs of an error: the problems of ours, the trace of any other."""
    for candidate in (error, getattr(error, "cause", None), error.__cause__, error.__context__):
        if isinstance(candidate, FedsgcgError):
            return "\n".join(str(problem) for problem in candidate.problems)
    return "".join(traceback.format_exception(error))


def _cell(tree: Mapping[str, Any], folder: Path, method: str, heldout: str, seed: int, device: str) -> Cell:
    output = folder / method / (heldout or "all-sites") / str(seed)
    run = f"{folder.name}/{method}/{heldout or 'all-sites'}/{seed}"
    own = {**tree, "heldout": heldout, "seed": seed, "output": str(output), "run": run}
    own["site"] = {**tree["site"], "device": device}
    Plan.from_tree(own)
    return Cell(method, heldout, seed, own)


def _for_method(rest: Sequence[str], method: str, located: Mapping[str, Any]) -> dict[str, Any]:
    tree = join([*rest, f"method={method}"])
    return {**tree, "data": located["data"], "site": located["site"]}


def _choice(tree: Mapping[str, Any]) -> str:
    return str(tree["method"]["name"])


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


def _check_same_study(study: Study) -> None:
    path = study.folder / "study.yaml"
    if not path.exists():
        return
    before = yaml.safe_load(path.read_text())["settings"]
    problems = [
        problem
        for method, tree in _settings_by_method(study).items()
        for problem in differences(before.get(method, tree), tree, f"{path}, {method}")
    ]
    if problems:
        raise FedsgcgError(*problems)


def _settings_by_method(study: Study) -> dict[str, Any]:
    """Settings of each method as `study.yaml` keeps them: what decides the outcome, less what differs between cells."""
    return {cell.method: _decisive(cell.tree) for cell in study.cells}


def _decisive(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = decisive_settings(Plan.from_tree(tree))
    return {name: value for name, value in kept.items() if name not in AXES or name == "method"}


def _write_record(study: Study) -> None:
    """Write `study.yaml`, keeping what earlier calls with more methods, hospitals or seeds had asked for."""
    path = study.folder / "study.yaml"
    before = yaml.safe_load(path.read_text()) if path.exists() else {}
    record = {
        "created": before.get("created", datetime.now(UTC).isoformat(timespec="seconds")),
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "fedsgcg study " + shlex.join(study.overrides),
        "methods": sorted({*before.get("methods", []), *(cell.method for cell in study.cells)}),
        "heldout": sorted({*before.get("heldout", []), *(cell.heldout for cell in study.cells)}),
        "seeds": sorted({*before.get("seeds", []), *(cell.seed for cell in study.cells)}),
        "sites": study.cells[0].tree["data"]["sites"],
        "runtime": study.runtime,
        "device": study.device,
        "machine": describe_machine(study.machine),
        "versions": {
            name: version(name) for name in ("fedsgcg", "torch", "flwr", "ray", "numpy", "pyarrow", "nibabel")
        },
        "settings": {**before.get("settings", {}), **_settings_by_method(study)},
    }
    Disk().write(path, yaml.safe_dump(record, sort_keys=False, allow_unicode=True).encode())


def describe_machine(machine: Machine) -> str:
    """One line on the machine: processor, cores, GPUs, Python."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux: the platform module's name has to do
        name = platform.machine()
    return f"{name}, {machine.cpus} cores, {machine.gpus} GPUs, Python {platform.python_version()}, {platform.system()}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with lock_file(folder / "lock"):
        yield
