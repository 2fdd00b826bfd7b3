"""Run a study: held-out sites x variants x seeds, each cell one federation.

As many cells run at once as the machine allows. A study's folder is its state: a second call with
the same settings uses the same folder and runs only the missing cells; an interrupted cell resumes
after its last completed round.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from fedsgcg.clients.data.case_files import data_warnings
from fedsgcg.common.console import Screen, catch_signals, steps_of
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.names import number_of
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.attacks.run import attack_study
from fedsgcg.deploy.environment import prepare_environment, quiet_flower
from fedsgcg.deploy.monitoring.metrics import served_metrics
from fedsgcg.deploy.monitoring.tracking import tracked_study
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.cleaning import RESUME, finished_cells, remove
from fedsgcg.deploy.study.lost_workers import as_lost
from fedsgcg.deploy.study.planned import plan_tables
from fedsgcg.deploy.study.preflight import Machine, check_folder, without_validation
from fedsgcg.deploy.study.progress import Progress
from fedsgcg.deploy.study.record import add_choices, check_same_study, collect, write_record
from fedsgcg.deploy.study.runtimes import (
    close_ray,
    gpu_share,
    ray_arguments,
    run_cell_in_process,
    run_cell_on_ray,
)
from fedsgcg.deploy.study.selection import Choice, choose, chosen_cell
from fedsgcg.deploy.study.study import Study, exit_code
from fedsgcg.server.records.journal import lock_file


def run_study(study: Study, console: Screen) -> int:
    """Run the missing cells, then write the tables and the report.

    A shard (`shard=K/N`) writes neither, because the other shards may still run.

    Returns:
        The exit code: 0 completed, 1 failed, 3 degraded.
    """
    check_folder(study.folder)
    with lock_file(study.folder / paths.LOCK, shared=study.shard is not None):
        check_same_study(study)
        write_record(study)
        missing = [cell for cell in study.cells if not cell.done]
        console.print(
            Text.assemble(
                (number_of(len(study.cells), "cell"), "bold"),
                f", {len(missing)} to do, in {study.folder}",
            )
        )
        console.print(_explain_runtime(study, len(missing)))
        _print_survey(study, console)
        for table in plan_tables(study.plans) if study.plans else ():
            console.print(table)
        _warn_without_heldout(study, console)
        ended = Ended()
        if missing or study.tracking:
            curves = [(cell.name, cell.folder, cell.tree) for cell in study.cells]
            with (
                served_metrics(study.folder, study.telemetry, console),
                tracked_study(study.folder, curves, study.tracking, study.mlflow_uri, console),
            ):
                missing, ended = _select(study, missing, console)
                with Progress(study.cells, console, _at_once(study, len(missing))):
                    if missing:
                        ended = ended.and_then(_run_cells(study, missing))
        if study.shard is None:
            _complete(study, console)
    _print_split_batches(missing, console)
    for name, text in ended.retried.items():
        console.print(
            f"{name} lost its worker ({text}) and was resumed after its last completed round.",
            style="yellow",
        )
    for name, text in ended.errors.items():
        console.print(f"{name} failed", style="bold red")
        console.print(text)
    return exit_code(study.cells)


def _complete(study: Study, console: Screen) -> None:
    """Remove what only a resume needs, and write the tables and the report."""
    from fedsgcg.server.report.build import make_report

    for folder in finished_cells(study.folder):
        remove(folder, RESUME)
    if any(Plan.from_tree(cell.tree).privacy.record for cell in study.cells):
        with steps_of(console, "attacking what was received") as step:
            problems = attack_study(study.folder, step)
        for problem in problems:
            console.print(str(problem), style="yellow")
    with steps_of(console, "making the report") as step:
        collect(study.folder)
        make_report(study.folder, step)


def _select(study: Study, missing: Sequence[Cell], console: Screen) -> tuple[list[Cell], Ended]:
    """Let each fold's source sites choose its settings.

    Inner cells are resumed like any other. If one failed, its fold's own cell waits for the next
    call.

    Returns:
        The cells that can run now, with the chosen settings, and how the inner cells ended.
    """
    waiting = {
        cell.name: study.candidates[cell.name] for cell in missing if cell.name in study.candidates
    }
    inner = [cell for found in waiting.values() for candidate in found for cell in candidate.inner]
    open_cells = [cell for cell in inner if not cell.done]
    if not inner:
        return list(missing), Ended()
    ended = Ended()
    if open_cells:
        console.print(
            f"choosing {len(waiting)} settings: {len(open_cells)} of {len(inner)} inner cells to do"
        )
        with Progress(inner, console, _at_once(study, len(open_cells))):
            ended = _run_cells(study, open_cells)
    ready: list[Cell] = []
    choices: dict[tuple[str, str, int], Choice] = {}
    for cell in missing:
        found = waiting.get(cell.name, ())
        if not all(part.done for candidate in found for part in candidate.inner):
            ended.errors[cell.name] = (
                "Not run, because an inner cell that chooses its setting failed."
            )
            continue
        try:
            choice = choose(found) if found else None
        except FedsgcgError as error:
            ended.errors[cell.name] = error_text(error)
            continue
        if choice is None:
            ready.append(cell)
            continue
        choices[cell.method, cell.heldout, cell.seed] = choice
        scores = ", ".join(f"{name}: {score:.3f}" for name, score in choice.scores.items())
        console.print(
            f"{cell.name}: {choice.settings} is chosen "
            f"(mean Dice at the held-out source hospitals: {scores})"
        )
        ready.append(chosen_cell(cell, found, choice))
    add_choices(study.folder, choices)
    return ready, ended


def _print_survey(study: Study, console: Screen) -> None:
    """Print which files of the data folder are not used, and sites whose names are nearly equal."""
    data = study.cells[0].tree["data"]
    sites = sorted({site for cell in study.cells for site in cell.tree["data"]["sites"]})
    for problem in data_warnings(Path(data["root"]), sites):
        console.print(str(problem), style="yellow")
    for problem in without_validation([Plan.from_tree(cell.tree) for cell in study.cells]):
        console.print(str(problem))


def _warn_without_heldout(study: Study, console: Screen) -> None:
    """Warn before the start that models are evaluated at the sites that trained them."""
    if any(not cell.heldout for cell in study.cells):
        console.print(
            "No hospital is held out: models are evaluated on validation cases of the hospitals "
            "that trained them. heldout=all holds out every hospital in turn.",
            style="yellow",
        )


def _print_split_batches(cells: Iterable[Cell], console: Screen) -> None:
    """Print the cells in which a site ran out of memory and continued with split batches."""
    from fedsgcg.server.report.reader import Reader
    from fedsgcg.server.report.rounds import cut_steps

    for cell in cells:
        reader = Reader(cell.folder)
        rows = reader.rows(cell.folder / paths.ROUNDS, ("metric", "site", "value"))
        if text := cut_steps(rows):
            console.print(f"{cell.name}: {text}.", style="yellow")


@dataclass
class Ended:
    """Failures and retries of cells.

    Attributes:
        errors: Name of a failed cell -> error text.
        retried: Name of a cell that lost its worker once -> reason.
    """

    errors: dict[str, str] = field(default_factory=dict)
    retried: dict[str, str] = field(default_factory=dict)

    def and_then(self, later: Ended) -> Ended:
        """Return the failures and retries of these cells and of later ones."""
        return Ended(self.errors | later.errors, self.retried | later.retried)


def _run_cells(study: Study, cells: Sequence[Cell]) -> Ended:
    """Run cells; one that lost its worker (RND-410) is resumed once, after all others.

    The retry uses a new Ray instance.
    """
    parallel = (
        study.shard is None
        and study.runtime == "inprocess"
        and (len(cells) > 1 or study.ray_address != "local")
    )
    failures = _run_once(study, cells, parallel=parallel)
    found = {cell.name: as_lost(failures[cell.name]) for cell in cells if cell.name in failures}
    lost = {name: error.problems[0].found for name, error in found.items() if error is not None}
    if lost:
        again = _run_once(study, [cell for cell in cells if cell.name in lost], parallel=parallel)
        failures = {name: error for name, error in failures.items() if name not in lost} | again
    return Ended({name: error_text(error) for name, error in failures.items()}, lost)


def _run_once(study: Study, cells: Sequence[Cell], *, parallel: bool) -> dict[str, BaseException]:
    """Run cells in parallel Ray tasks or one after the other; a failure never stops other cells."""
    prepare_environment()
    if parallel:
        return _run_in_parallel(study, cells)
    errors: dict[str, BaseException] = {}
    for cell in cells:
        if cell.done:  # meanwhile, by a shard of a call with another number of shards
            continue
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
    close_ray(study.ray_address)
    import ray

    quiet_flower()
    ray.init(**ray_arguments(study.machine, study.ray_address))
    catch_signals()  # Ray has replaced the handler of SIGTERM
    try:
        threads = int(cells[0].tree["site"]["threads"])
        # Of this machine, or of all machines of a cluster.
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        machine = Machine(int(resources.get("CPU", 1)), int(resources.get("GPU", 0)))
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


def error_text(error: BaseException) -> str:
    """Return the problems of a `FedsgcgError`, RND-410 for a lost worker, else the traceback."""
    lost = as_lost(error)
    if lost is not None:
        return str(lost)
    for candidate in (error, getattr(error, "cause", None), error.__cause__, error.__context__):
        if isinstance(candidate, FedsgcgError):
            return "\n".join(str(problem) for problem in candidate.problems)
    return "".join(traceback.format_exception(error))


def _at_once(study: Study, missing: int) -> int:
    """Return the number of cells that run at the same time; more of them do on a cluster."""
    if study.shard is not None or study.runtime == "ray":
        return 1
    threads = int(study.cells[0].tree["site"]["threads"])
    return max(1, min(missing, study.machine.cpus // threads))


def _explain_runtime(study: Study, missing: int) -> str:
    gpus = f"{study.machine.gpus} GPUs" if study.machine.gpus else "no GPU"
    if study.shard is not None:
        how = f"shard {study.shard}: one cell after the other, each a federation in this process"
    elif study.runtime == "ray":
        how = "hospitals in parallel: Flower's simulation engine on Ray, one cell after the other"
    else:
        at_once = _at_once(study, missing)
        how = f"cells in parallel: {at_once} at once, each a federation in one process"
        if missing > 1:
            how += " (Ray tasks)"
    resources = f"{study.machine.cpus} CPU cores, {gpus}"
    return f"runtime={study.runtime} ({how}), device={study.device}, {resources}"
