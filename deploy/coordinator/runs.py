"""`fedsgcg run`, `resume`, `stop`: run a study on real hospitals, one cell after the other.

A run continues on the coordinator's server if this command ends, and completed rounds stay in the
run folder if the server ends. The same command, called again, therefore resumes the study.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from fedsgcg.common.console import Screen, steps_of
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.names import number_of
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.coordinator.bundle import Bundle, build_bundle, run_config
from fedsgcg.deploy.coordinator.control import Control, RunState, control_of
from fedsgcg.deploy.coordinator.project import Kit, SubmittedRun
from fedsgcg.deploy.monitoring.tracking import check_packages, tracked_study
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.grid import (
    split_axes,
    split_select,
    variants,
    with_grid,
)
from fedsgcg.deploy.study.plan import make_cell
from fedsgcg.deploy.study.preflight import check_plan, inspect_machine
from fedsgcg.deploy.study.progress import Progress
from fedsgcg.deploy.study.record import check_same_study, collect, write_record
from fedsgcg.deploy.study.study import Study, exit_code, identity
from fedsgcg.deploy.study.summary import print_summary
from fedsgcg.server.records.journal import lock_file
from fedsgcg.server.sites.departures import OPTION, check_departures, declare, departed

POLL_S: Final = 1.0
SERVER_AWAY_S: Final = 300.0
"""Seconds without an answer from the server, e.g. during a restart, until the command gives up."""

STOPPING_S: Final = 60.0
SITES_DECIDE: Final = ("CFG-004",)
"""Problems that depend on the site's device and are not checked at the coordinator."""


def plan_deployment(kit: Kit, overrides: Sequence[str]) -> Study:
    """Turn the project and a command line into a study on real hospitals.

    Raises:
        FedsgcgError: CFG-001 to CFG-003 for every invalid setting.
    """
    project = kit.project()
    merged = {text.partition("=")[0]: text for text in (*project.plan, *overrides)}
    given, names = split_select(list(merged.values()))
    values, rest = split_axes(given)
    first = [f"{name}={values[name][0]}" for name in ("method", "federation") if values.get(name)]
    base = project.settings((*rest, *first))
    if names or base["select"]:
        action = "choose the value with fedsgcg study, then set it"
        raise fail(
            "CFG-001",
            where="select",
            found=str(names),
            expected="no selection, which real hospitals do not support",
            action=action,
        )
    _check_rows(base)
    if base["shard"]:
        expected = "no shard: the runs of a federation follow one another"
        raise fail("CFG-001", where="shard", found=str(base["shard"]), expected=expected)
    axes = with_grid(values, base["grid"], rest)
    sites: list[str] = base["data"]["sites"]
    heldouts = axes.get("heldout") or [str(base["heldout"])]
    if heldouts == ["all"]:
        heldouts = sites
    seeds = [int(text) for text in axes.get("seed") or [str(base["seed"])]]
    compared = variants(axes, str(base["method"]["name"]), str(base["federation"]["ownership"]))
    if alone := [variant.federation for variant in compared if variant.federation != "by_site"]:
        expected = "by_site: each real hospital trains on its own images within the federation"
        raise fail(
            "CFG-001",
            where="federation",
            found=alone[0],
            expected=expected,
            action="use fedsgcg study for this comparison",
        )
    folder = kit.runs / f"{base['data']['name']}-{identity(base)[:8]}"
    trees = {variant.label: project.settings((*rest, *variant.overrides)) for variant in compared}
    cells = tuple(
        make_cell(trees[variant.label], folder, variant, heldout, seed)
        for seed in seeds
        for heldout in heldouts
        for variant in compared
    )
    _check(cells)
    return Study(
        folder=folder,
        cells=cells,
        runtime="superlink",
        device="sites",
        machine=inspect_machine(),
        ray_address="",
        overrides=tuple(overrides),
        command="run",
        data="at the sites",
        tracking=tuple(base["tracking"]),
        mlflow_uri=str(base["mlflow_uri"]),
    )


def _check_rows(tree: Mapping[str, Any]) -> None:
    """Refuse references and budgets, which need all images in one place; raises CFG-041."""
    budget, references = tree["budget"], tree["references"]
    given = [f"budget={budget}"] if budget != "rounds" else []
    given += [f"references={list(references)}"] if references else []
    if given:
        expected = "neither: real hospitals only train in the federation"
        action = "use fedsgcg study for this comparison"
        found = " and ".join(given)
        raise fail("CFG-041", found=found, expected=expected, action=action, where="settings")


def run_kit(
    path: Path,
    overrides: Sequence[str],
    console: Screen,
    *,
    detach: bool = False,
    without: Sequence[str] = (),
) -> int:
    """Submit the missing cells of a study, one after the other, and watch them.

    Args:
        path: The coordinator's kit.
        overrides: Settings as `name=value`; they override the project's.
        console: Console for progress messages.
        detach: Submit the first missing cell and return.
        without: Sites that have left for good; the run folders record them.

    Returns:
        The exit code: 0 completed, 1 failed, 3 degraded.

    Raises:
        FedsgcgError: DEP-610 to DEP-612 for the server, DEP-614 while another run is in progress,
            CFG-001 to CFG-003 and CFG-005 for settings, CFG-001 for sites that cannot leave.
    """
    from fedsgcg.server.report.build import make_report

    kit = Kit.at(path)
    study = plan_deployment(kit, overrides)
    check_leaving(study, without)
    check_packages(study.tracking)
    study.folder.mkdir(parents=True, exist_ok=True)
    if warning := kit.project().missing_limits():
        console.print(str(warning), style="yellow")
    bundle = build_bundle()
    with control_of(kit) as control, lock_file(study.folder / paths.LOCK):
        refuse_second_run(kit, control)
        check_same_study(study)
        write_record(study)
        missing = [cell for cell in study.cells if not cell.done]
        if without:
            for cell in missing:
                declare(Plan.from_tree(cell.tree), without, Disk())
        console.print(
            Text.assemble(
                (number_of(len(study.cells), "cell"), "bold"),
                f", {len(missing)} to do, in {study.folder}",
            )
        )
        console.print(f"app bundle {bundle.digest[:16]}; each hospital must have approved it")
        curves = [(cell.name, cell.folder, cell.tree) for cell in study.cells]
        with tracked_study(study.folder, curves, study.tracking, study.mlflow_uri, console):
            for cell in missing:
                submitted = submit(kit, control, cell, bundle, overrides)
                if detach:
                    console.print(f"run {submitted.run_id} started; fedsgcg status {kit.folder}")
                    return 0
                try:
                    watch(control, cell, submitted, console)
                except FedsgcgError as error:
                    if error.code != "DEP-615":
                        raise
                    console.print(str(error), style="red")
                    return 1
        with steps_of(console, "making the report") as step:
            collect(study.folder)
            make_report(study.folder, step)
    code = exit_code(study.cells)
    print_summary(study.folder, study.cells, code, console)
    return code


def check_leaving(study: Study, sites: Sequence[str]) -> None:
    """Check, before anything is written, that sites can leave a study.

    A site cannot leave a finished study, and only a training site can leave.

    Raises:
        FedsgcgError: CFG-001 for every problem.
    """
    if not sites:
        return
    missing = [cell for cell in study.cells if not cell.done]
    if not missing:
        found = "a finished study: nothing can be removed from a finished model"
        raise fail(
            "CFG-001", where=OPTION, found=found, action="train a new study without the site"
        )
    problems: dict[Problem, None] = {}
    for cell in missing:
        try:
            check_departures(Plan.from_tree(cell.tree), {*sites, *departed(cell.folder)})
        except FedsgcgError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise FedsgcgError(*problems)


def submit(
    kit: Kit, control: Control, cell: Cell, bundle: Bundle, overrides: Sequence[str]
) -> SubmittedRun:
    """Submit one cell and record it in the kit."""
    run_id = control.start(bundle.data, run_config(cell.tree))
    run = SubmittedRun(run_id, str(cell.folder), tuple(overrides), bundle.digest, time.time())
    kit.record_run(run)
    return run


def watch(control: Control, cell: Cell, run: SubmittedRun, console: Screen) -> None:
    """Show a run's progress until it has finished, waiting while the server does not answer.

    Raises:
        FedsgcgError: DEP-615 when Flower reports the run as finished but the app wrote no outcome;
            DEP-610 when the server does not answer for too long.
    """
    try:
        with Progress([cell], console):
            state = wait_until_over(control, run.run_id, console)
    except KeyboardInterrupt:
        console.print(
            "The run continues on the server; see fedsgcg status, or fedsgcg stop.", style="yellow"
        )
        raise
    if _has_outcome_of(cell, run):
        outcome = cell.outcome()
        if outcome.get("status") == "failed":
            for problem in outcome.get("problems", []):
                console.print(str(Problem(**problem)), style="red")
        return
    found = "no such run at the server"
    if state:
        found = " ".join(filter(None, (state.ending, state.details)))
    raise fail(
        "DEP-615",
        where=f"run {run.run_id}",
        found=found,
        action="see state/runs.log of the kit; `fedsgcg resume KIT` resumes after the last "
        "completed round",
    )


def wait_until_over(control: Control, run_id: int, console: Screen) -> RunState | None:
    """Wait until Flower reports a run as finished; returns None if the server has no such run."""
    away_since = 0.0
    while True:
        try:
            state = control.run(run_id)
        except FedsgcgError as error:
            now = time.monotonic()
            if error.code != "DEP-610" or (away_since and now - away_since > SERVER_AWAY_S):
                raise
            if not away_since:
                away_since = now
                console.print("The server does not answer; waiting for it.", style="yellow")
        else:
            away_since = 0.0
            if state is None or state.over:
                return state
        time.sleep(POLL_S)


def resume_kit(
    path: Path, console: Screen, *, detach: bool = False, without: Sequence[str] = ()
) -> int:
    """Resume the run that was submitted last; raises DEP-613 when there is none.

    Sites in `without` leave the run for good.
    """
    last = Kit.at(path).last_run()
    return run_kit(path, last.overrides, console, detach=detach, without=without)


def stop_kit(path: Path, console: Screen) -> int:
    """Stop the run that is in progress; completed rounds are kept."""
    kit = Kit.at(path)
    run_id = kit.last_run().run_id
    with control_of(kit) as control:
        state = control.run(run_id)
        if state is None or state.over:
            console.print("No run is in progress.")
            return 0
        control.stop(run_id)
        end = time.monotonic() + STOPPING_S
        while time.monotonic() < end:
            state = control.run(run_id)
            if state is None or state.over:
                break
            time.sleep(POLL_S)
    console.print(f"run {run_id} stopped; resume it with fedsgcg resume {kit.folder}")
    return 0


def refuse_second_run(kit: Kit, control: Control) -> None:
    """Raise DEP-614 while another run is in progress: a site works on one run at a time."""
    if not kit.last_run_file.exists():
        return
    run_id = kit.last_run().run_id
    state = control.run(run_id)
    if state is not None and not state.over:
        action = (
            f"wait, look at it (fedsgcg status {kit.folder}) or stop it (fedsgcg stop {kit.folder})"
        )
        raise fail("DEP-614", where=f"run {run_id}", found=state.status, action=action)


def _has_outcome_of(cell: Cell, run: SubmittedRun) -> bool:
    """Return whether the app wrote this run's outcome; it removes an older one when it starts."""
    path = cell.folder / paths.OUTCOME
    return path.exists() and path.stat().st_mtime >= run.time - 1.0


def _check(cells: Sequence[Cell]) -> None:
    """Raise one error with the problems of all cells."""
    problems: dict[Problem, None] = {}
    for cell in cells:
        try:
            check_plan(Plan.from_tree(cell.tree), "cpu")
        except FedsgcgError as error:
            problems |= dict.fromkeys(
                problem for problem in error.problems if problem.code not in SITES_DECIDE
            )
    if problems:
        raise FedsgcgError(*problems)
