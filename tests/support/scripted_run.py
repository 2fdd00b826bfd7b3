"""A federation of scripted hospitals, run in one call, and its outcome."""

import json
from pathlib import Path

from fedsgcg.common.settings.plan import Plan
from fedsgcg.server.federation import Outcome, run_federation
from tests.support.scripted_grid import SILENCE, Script, ScriptedGrid

ALL = ("A", "B", "C", "D")


def run(plan: Plan, sites: tuple[str, ...] = ALL, **grid: object) -> tuple[Outcome, ScriptedGrid]:
    found = ScriptedGrid(plan, sites, **grid)  # type: ignore[arg-type]
    return run_federation(found, plan), found


def silent(site: str, kind: str, rounds: range = range(0, 99)) -> Script:
    """A script in which one site does not answer one kind of message in some rounds."""
    return lambda grid, name, what, request, reply: (
        SILENCE if (name, what) == (site, kind) and request.identity.round in rounds else reply
    )


def status_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "outcome.json").read_text())
    return found
