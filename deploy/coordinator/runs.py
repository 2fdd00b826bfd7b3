"""`fedsgcg run`, `resume`, `stop`: a study on real hospitals, cell after cell, through the coordinator's server.

The server keeps a run going whatever happens to this command; the run folder keeps what is done whatever happens to
the server. So the same command, called again, goes on where things stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from common.console import Screen, steps_of
from common.errors import FedsgcgError, Problem, fail
from common.files.disk import Disk
from common.settings.plan import Plan
from deploy.coordinator.bundle import Bundle, build_bundle, run_config
from deploy.coordinator.control import Control, RunState, control_of
from deploy.coordinator.last_run import Started, last_started, remember
from deploy.coordinator.project import Kit
from deploy.study.cell import Cell
from deploy.study.grid import Variant, folder_name, split_axes, split_select, variants, with_grid
from deploy.study.preflight import check_plan, look_at_machine
from deploy.study.progress import Progress
from deploy.study.record import check_same_study, collect, write_record
from deploy.study.study import Study, exit_code, identity
from deploy.study.summary import tell_end
from server.records.journal import lock_file
from server.sites.departures import OPTION, check_departures, declare, departed

POLL_S: Final = 1.0
SERVER_AWAY_S: Final = 300.0
"""How long a server may be away, e.g. restarting, before the command gives up on watching a run."""

STOPPING_S: Final = 60.0
SITES_DECIDE: Final = ("CFG-004",)
"""Problems that only a site can judge: its device is not the coordinator's."""


def plan_deployment(kit: Kit, overrides: Sequence[str]) -> Study:
    """Turn the project and a command line into a study on real hospitals.

    Raises:
        FedsgcgError: CFG-001 to CFG-003 with everything that cannot be.
    """
    project = kit.project()
    merged = {text.partition("=")[0]: text for text in (*project.plan, *overrides)}
    given, names = split_select(list(merged.values()))
    values, rest = split_axes(given)
    first = [f"{name}={values[name][0]}" for name in ("method", "federation") if values.get(name)]
    base = project.settings((*rest, *first))
    if names or base["select"]:
        action = "choose with fedsgcg study, then set the value"
        raise fail(
            "CFG-001",
            where="select",
            found=str(names),
            expected="nothing at real hospitals",
            action=action,
        )
    axes = with_grid(values, base["grid"], rest)
    sites: list[str] = base["data"]["sites"]
    heldouts = axes.get("heldout") or [str(base["heldout"])]
    heldouts = sites if heldouts == ["all"] else heldouts
    seeds = [int(text) for text in axes.get("seed") or [str(base["seed"])]]
    compared = variants(axes, str(base["method"]["name"]), str(base["federation"]["ownership"]))
    if alone := [variant.federation for variant in compared if variant.federation != "by_site"]:
        expected = "by_site: at real hospitals each trains on its own images, with the others"
        raise fail(
            "CFG-001",
            where="federation",
            found=alone[0],
            expected=expected,
            action="use fedsgcg study for it",
        )
    folder = kit.runs / f"{base['data']['name']}-{identity(base)[:8]}"
    trees = {variant.label: project.settings((*rest, *variant.overrides)) for variant in compared}
    cells = tuple(
        _cell(trees[variant.label], folder, variant, heldout, seed)
        for seed in seeds
        for heldout in heldouts
        for variant in compared
    )
    _check(cells)
    machine = look_at_machine()
    return Study(
        folder, cells, "superlink", "sites", machine, "", tuple(overrides), "run", "at the sites"
    )


def run_kit(
    path: Path,
    overrides: Sequence[str],
    console: Screen,
    *,
    detach: bool = False,
    without: Sequence[str] = (),
) -> int:
    """Submit the cells of a study that are missing, one after the other, and watch them.

    Args:
        path: The coordinator's kit.
        overrides: Settings as `name=value`, over those of the project.
        console: Where progress is told.
        detach: Submit the first missing cell and return.
        without: Sites that have left for good; the run folders remember them.

    Returns:
        The exit code: 0 completed, 1 failed, 3 degraded.

    Raises:
        FedsgcgError: DEP-610 to DEP-612 for the server, DEP-614 while another run is under way, CFG-001 to CFG-003 and
            CFG-005 for settings, CFG-001 for sites that cannot leave.
    """
    from server.report.build import make_report

    kit = Kit.at(path)
    study = plan_deployment(kit, overrides)
    check_leaving(study, without)
    study.folder.mkdir(parents=True, exist_ok=True)
    bundle = build_bundle()
    with control_of(kit) as control, lock_file(study.folder / "lock"):
        refuse_second_run(kit, control)
        check_same_study(study)
        write_record(study)
        missing = [cell for cell in study.cells if not cell.done]
        for cell in missing if without else ():
            declare(Plan.from_tree(cell.tree), without, Disk())
        console.print(
            Text.assemble(
                (f"{len(study.cells)} cells", "bold"), f", {len(missing)} to do, in {study.folder}"
            )
        )
        console.print(f"app bundle {bundle.digest[:16]}, which each hospital must have approved")
        for cell in missing:
            started = submit(kit, control, cell, bundle, overrides)
            if detach:
                console.print(f"run {started.run_id} started; fedsgcg status {kit.folder}")
                return 0
            try:
                watch(control, cell, started, console)
            except FedsgcgError as error:
                if error.code != "DEP-615":
                    raise
                console.print(str(error), style="red")
                return 1
        with steps_of(console, "making the report") as tell:
            collect(study.folder)
            make_report(study.folder, tell)
    code = exit_code(study.cells)
    tell_end(study.folder, study.cells, code, console)
    return code


def check_leaving(study: Study, sites: Sequence[str]) -> None:
    """Refuse a departure that cannot be, before anything is written: from a study that is done, or of no training site.

    Raises:
        FedsgcgError: CFG-001 with everything that is wrong.
    """
    if not sites:
        return
    missing = [cell for cell in study.cells if not cell.done]
    if not missing:
        found = "a study that is done: nothing can be taken out of a finished model"
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
) -> Started:
    """Submit one cell and remember it."""
    run_id = control.start(bundle.data, run_config(cell.tree))
    started = Started(run_id, str(cell.folder), tuple(overrides), bundle.digest, time.time())
    remember(kit, started)
    return started


def watch(control: Control, cell: Cell, started: Started, console: Screen) -> None:
    """Show a run's progress until it has finished; a server that is away for a while is waited for.

    Raises:
        FedsgcgError: DEP-615 when Flower says that the run is over and the app has not said how it ended; DEP-610 when
            the server stays away.
    """
    try:
        with Progress([cell], console):
            state = wait_until_over(control, started.run_id, console)
    except KeyboardInterrupt:
        console.print(
            "The run goes on at the server; fedsgcg status, or fedsgcg stop.", style="yellow"
        )
        raise
    if _is_of_this_run(cell, started):
        outcome = cell.outcome()
        for problem in outcome.get("problems", []) if outcome.get("status") == "failed" else []:
            console.print(str(Problem(**problem)), style="red")
        return
    raise fail(
        "DEP-615",
        where=f"run {started.run_id}",
        found=" ".join(filter(None, (state.ending, state.details)))
        if state
        else "the server does not know the run",
        action="look into state/runs.log of the kit; `fedsgcg resume KIT` goes on after the last done round",
    )


def wait_until_over(control: Control, run_id: int, console: Screen) -> RunState | None:
    """Wait until Flower says that a run is over; returns None for a run that the server does not know."""
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
    """Go on with what was last submitted, without the sites that left for good; raises DEP-613 when nothing was."""
    started = last_started(Kit.at(path))
    return run_kit(path, started.overrides, console, detach=detach, without=without)


def stop_kit(path: Path, console: Screen) -> int:
    """Stop the run that is under way; what is done stays."""
    kit = Kit.at(path)
    started = last_started(kit)
    with control_of(kit) as control:
        state = control.run(started.run_id)
        if state is None or state.over:
            console.print("No run is under way.")
            return 0
        control.stop(started.run_id)
        end = time.monotonic() + STOPPING_S
        while (
            time.monotonic() < end
            and (state := control.run(started.run_id)) is not None
            and not state.over
        ):
            time.sleep(POLL_S)
    console.print(f"run {started.run_id} stopped; fedsgcg resume {kit.folder} goes on")
    return 0


def refuse_second_run(kit: Kit, control: Control) -> None:
    """Refuse a run while another one is under way (DEP-614): the hospitals answer one at a time."""
    if not (kit.state / "run.json").exists():
        return
    started = last_started(kit)
    state = control.run(started.run_id)
    if state is not None and not state.over:
        action = f"wait, look (fedsgcg status {kit.folder}), or end it (fedsgcg stop {kit.folder})"
        raise fail("DEP-614", where=f"run {started.run_id}", found=state.status, action=action)


def _is_of_this_run(cell: Cell, started: Started) -> bool:
    """Whether the app wrote how this run ended; it removes an older `outcome.json` when it starts."""
    path = cell.folder / "outcome.json"
    return path.exists() and path.stat().st_mtime >= started.time - 1.0


def _cell(tree: dict[str, Any], folder: Path, variant: Variant, heldout: str, seed: int) -> Cell:
    parts = (folder_name(variant.label), heldout or "all-sites", str(seed))
    own = {**tree, "heldout": heldout, "seed": seed, "output": str(folder.joinpath(*parts))}
    own |= {
        "run": "/".join((folder.name, *parts)),
        "label": variant.label,
        "setting": " ".join(variant.settings),
    }
    Plan.from_tree(own)
    return Cell(variant.label, heldout, seed, own)


def _check(cells: Sequence[Cell]) -> None:
    """Raise one error with everything that is impossible in any of the cells."""
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
