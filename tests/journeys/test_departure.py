"""A hospital leaves for good between two rounds of a real federation in one process.

Images, training and journal are real.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.clients.app import build_client_app
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.payload import decode_statistics
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.inprocess import run_in_process
from fedsgcg.server.app import build_server_app
from fedsgcg.server.records.checkpoint import RoundRecord, decode_checkpoint
from fedsgcg.server.sites.departures import declare
from tests.support import small

pytestmark = pytest.mark.slow
LEAVER = "North"


class Stopped(Exception):
    """The coordinator is stopped."""


def federate(cell: Cell, stop_after: int = 0) -> None:
    """Run a cell in this process with all its hospitals, to its end or until a round is done."""

    def hear(event: dict[str, object]) -> None:
        if event["event"] == "round.done" and event["round"] == stop_after:
            raise Stopped

    app = build_server_app(dict(cell.tree), hear)
    run_in_process(app, build_client_app(dict(cell.tree)), Plan.from_tree(cell.tree).members())


def checkpoint(cell: Cell, number: int) -> RoundRecord:
    return decode_checkpoint(cell.folder / "journal" / f"checkpoint-{number:05d}.safetensors")[0]


def training_rounds(cell: Cell, site: str) -> int:
    """Training answers that left a hospital, by its own ledger."""
    lines = (cell.folder / "sites" / site / "ledger.jsonl").read_text().splitlines()
    return sum("weights" in json.loads(line)["parts"] for line in lines)


@pytest.mark.parametrize("memory", ["cumulative", "lagged"])
def test_the_study_goes_on_without_the_hospital_and_remembers_no_pixel_of_it(
    hospitals: Path, tmp_path: Path, memory: str
) -> None:
    settings = (
        "method=sgcg",
        "heldout=South",
        "federation.rounds=4",
        f"prototypes.memory={memory}",
    )
    (cell,) = small.plan(hospitals, tmp_path, *settings).cells
    with pytest.raises(Stopped):
        federate(cell, stop_after=2)
    before = checkpoint(cell, 2)
    assert set(before.parts) == {"East", LEAVER, "West"}
    declare(Plan.from_tree(cell.tree), [LEAVER], Disk())
    federate(cell)

    outcome = cell.outcome()
    assert (outcome["status"], outcome["rounds_done"]) == ("degraded", 4)
    (note,) = outcome["problems"]
    assert (note["code"], note["where"]) == ("RND-407", LEAVER)
    assert "gone from round 3 on" in note["found"]
    assert set(outcome["sites"]) == {"East", "South", "West"}
    assert training_rounds(cell, LEAVER) == 2, (
        "its process was there all the time, and was asked for nothing more"
    )
    assert training_rounds(cell, "East") == 4

    after = checkpoint(cell, 4)
    rounds = (
        3 if memory == "cumulative" else 1
    )  # the model of round 1 is described in round 2, that of 3 in 4
    assert set(after.parts) == {"East", "West"}
    stored, _ = decode_statistics((cell.folder / "prototypes.arrow").read_bytes())
    np.testing.assert_array_equal(
        stored.count, sum(part.count for part in after.parts.values()) / rounds
    )
    pixels = before.parts["East"].count.sum()
    assert after.parts["East"].count.sum() == rounds * pixels, (
        "who stays keeps all that it ever sent"
    )


def test_a_federation_that_never_knew_the_hospital_ends_with_the_same_prototypes(
    hospitals: Path, tmp_path: Path
) -> None:
    """A departure before the first round gives the model of a study without the site."""
    settings = (
        "method=sgcg",
        "heldout=South",
        "federation.rounds=2",
        "prototypes.memory=cumulative",
    )
    (left,) = small.plan(hospitals, tmp_path / "left", *settings).cells
    declare(Plan.from_tree(left.tree), [LEAVER], Disk())
    federate(left)
    (never,) = small.plan(
        hospitals, tmp_path / "never", *settings, "data.sites=[East,South,West]"
    ).cells
    federate(never)
    assert (left.outcome()["status"], never.outcome()["status"]) == ("degraded", "completed")
    assert left.outcome()["digest"] == never.outcome()["digest"] != ""
    one, other = checkpoint(left, 2), checkpoint(never, 2)
    for site in ("East", "West"):
        for name in ("count", "mean", "scatter"):
            assert (
                getattr(one.parts[site], name).tobytes()
                == getattr(other.parts[site], name).tobytes()
            )
