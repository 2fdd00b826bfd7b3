"""A federation with secure sums: the plain model, nothing of a single site, drop-outs recovered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from safetensors.numpy import load_file

from fedsgcg.clients.app import build_client_app
from fedsgcg.clients.guard.secure_sums import SiteSums
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Reply
from fedsgcg.deploy.study.inprocess import InProcessGrid
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from fedsgcg.server.federation import Outcome, run_federation
from tests.support import small

HOSPITALS = ("A", "B", "C", "D", "E")  # E is held out
TEXTS = (
    *("heldout=E", "federation.rounds=2", "prototypes.memory=lagged", "prototypes.warmup_rounds=0"),
    *("prototypes.weight=0.1", "method.batch_size=2", "data.validation_fraction=0.5"),
)
SUMS = ("privacy=secure_sums", "privacy.min_patients=1", "privacy.min_pixels=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    return write_hospitals(folder, sites=HOSPITALS, cases_per_site=2, shape=(4, 40, 40))


def model_of(folder: Path, number: int) -> np.ndarray:
    """The weights after a round."""
    values: np.ndarray = load_file(folder / f"journal/checkpoint-{number:05d}.safetensors")[
        "weights"
    ]
    return values


def loss_of(folder: Path, number: int) -> float:
    """The mean loss of a round, weighted by the sites' slices."""
    rows = pq.read_table(folder / "rounds.parquet").to_pylist()
    own = {
        (row["metric"], row["site"]): row["value"]
        for row in rows
        if row["round"] == number and row["phase"] == "train"
    }
    names = [site for metric, site in own if metric == "loss"]
    total = sum(own["examples", site] for site in names)
    return float(sum(own["examples", site] * own["loss", site] for site in names) / total)


@pytest.mark.slow
@pytest.mark.row(64)
def test_the_model_is_the_plain_one_and_no_file_has_anything_of_one_site(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = small.plan(root, tmp_path / "plain", *TEXTS).cells
    run_cell_in_process(plain.tree)
    sent: list[Reply] = []
    mask = SiteSums.mask

    def recorded(sums: SiteSums, reply: Reply) -> Reply:
        sent.append(reply)
        return mask(sums, reply)

    monkeypatch.setattr(SiteSums, "mask", recorded)
    (cell,) = small.plan(root, tmp_path / "sums", *TEXTS, *SUMS).cells
    run_cell_in_process(cell.tree)
    outcome = cell.outcome()
    assert (outcome["status"], outcome["problems"]) == ("completed", [])
    first = np.abs(model_of(cell.folder, 1) - model_of(plain.folder, 1))
    assert first.max() <= np.finfo(np.float32).eps * np.abs(model_of(plain.folder, 1)).max()
    # Adam amplifies the last bits in the second round.
    assert np.abs(model_of(cell.folder, 2) - model_of(plain.folder, 2)).max() < 2e-3
    assert loss_of(cell.folder, 1) == pytest.approx(loss_of(plain.folder, 1), rel=1e-6)
    assert leaks(cell.folder, sent) == []
    sums = json.loads((cell.folder / "sums.json").read_text())
    assert all(entry["sites"] == ["A", "B", "C", "D"] for entry in sums)


def leaks(folder: Path, sent: list[Reply]) -> list[str]:
    """Files of the coordinator with numbers that one site masked; the sites' own are left out."""
    pieces = []
    for reply in sent:
        if reply.weights is not None:
            values = reply.weights.values
            pieces += [values[start : start + 8].tobytes() for start in range(0, values.size, 997)]
        if reply.statistics is not None:
            pieces += [row[:4].tobytes() for row in reply.statistics.mean if row.any()]
        if reply.moments is not None:
            pieces += [reply.moments.mean[:4].tobytes(), reply.moments.scatter[:4].tobytes()]
    assert len(pieces) > 100
    files = [path for path in folder.rglob("*") if path.is_file() and "sites" not in path.parts]
    assert any(path.name.startswith("checkpoint") for path in files)
    return [
        str(path)
        for path in files
        if (content := path.read_bytes())
        for piece in pieces
        if piece in content
    ]


class DroppingGrid(InProcessGrid):
    """Loses the answers of some sites to some messages, after the site has done its work."""

    def __init__(self, plan: Plan, gone: Mapping[tuple[int, str], tuple[str, ...]]) -> None:
        super().__init__(build_client_app(plan.to_tree()), plan.members(), 1)
        self.gone = gone
        self.lost: list[tuple[int, str, str]] = []
        self.seen: list[bytes] = []

    def _serve(self, message: Message) -> Message:
        reply = super()._serve(message)
        kind = message.metadata.message_type
        number = json.loads(str(message.content["message"]["identity"]))["round"]
        site = str(reply.content["message"]["site"])
        key = number, kind
        if site in self.gone.get(key, ()) and (number, kind, site) not in self.lost:
            self.lost.append((number, kind, site))
            failed = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "dropped out")
            return Message(failed, reply_to=message)
        return reply


STEPS = (wire.SUM_KEYS, wire.SUM_SHARES, wire.TRAIN, wire.SUM_CHECK, wire.SUM_OPEN)


def federated(
    root: Path, output: Path, gone: Mapping[tuple[int, str], tuple[str, ...]], *more: str
) -> tuple[Outcome, DroppingGrid]:
    """Run a federation in which answers are lost."""
    texts = (*TEXTS, *SUMS, "method=source", "method.statistics=false", "method.steps_per_round=1")
    norm = "federation.norm_policy=average"  # one sum per round
    (cell,) = small.plan(root, output, *texts, norm, "federation.quorum=3", *more).cells
    plan = Plan.from_tree(cell.tree)
    grid = DroppingGrid(plan, gone)
    try:
        return run_federation(grid, plan), grid
    finally:
        grid.close()


@pytest.mark.slow
@pytest.mark.row(64)
def test_a_drop_out_at_each_step_is_recovered(root: Path, tmp_path: Path) -> None:
    gone = dict.fromkeys(enumerate(STEPS, start=1), ("B",))
    outcome, grid = federated(root, tmp_path, gone, "federation.rounds=5")
    assert len(grid.lost) == 5
    codes = {problem.code for problem in outcome.problems}
    assert (outcome.status, outcome.rounds_done, codes) == ("degraded", 5, {"SITE-500"})
    sums = json.loads(next(tmp_path.rglob("sums.json")).read_text())
    counts = [len(entry["sites"]) for entry in sums]
    assert counts == [3, 3, 3, 4, 4]  # it is part of the sum once its numbers have arrived


@pytest.mark.slow
@pytest.mark.row(64)
def test_with_too_few_sites_at_any_step_the_round_is_void(root: Path, tmp_path: Path) -> None:
    gone = dict.fromkeys(((2, STEPS[3]), (4, STEPS[4])), ("B", "C"))
    outcome, grid = federated(root, tmp_path, gone, "federation.rounds=4")
    assert len(grid.lost) == 4
    codes = {problem.code for problem in outcome.problems}
    assert {"PRV-953", "RND-421"} <= codes
    assert outcome.status == "degraded"
    assert outcome.rounds_done == 4
