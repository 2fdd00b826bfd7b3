"""The run folder: what it records, and runs that are refused, damaged or resumed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.wire.messages import TRAIN
from fedsgcg.server.federation import run_federation
from fedsgcg.server.records.journal import Journal
from tests.support.plans import small_plan
from tests.support.scripted_grid import ScriptedGrid
from tests.support.scripted_run import ALL, run, status_of


def test_the_outcome_says_on_which_processor_and_torch_its_hash_was_made(tmp_path: Path) -> None:
    outcome, _ = run(small_plan(tmp_path, site__threads=2))
    found = status_of(tmp_path)
    assert found["digest"] == outcome.digest != ""
    machine = found["machine"]
    assert isinstance(machine, dict)
    assert set(machine) == {"cpu", "capability", "torch", "threads"}
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 2
    assert machine["capability"] == torch.backends.cpu.get_cpu_capability()  # type: ignore[no-untyped-call]
    model = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    assert machine["cpu"]
    assert not model or model[0].endswith(machine["cpu"])


@pytest.mark.row(39)
def test_a_second_process_on_the_run_folder_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    with Journal.of_plan(plan):
        with pytest.raises(FedsgcgError) as caught:
            run(plan)
        assert caught.value.code == "CFG-006"
        assert not (tmp_path / "events.jsonl").exists()
        assert not (tmp_path / "outcome.json").exists()


@pytest.mark.row(38)
def test_other_settings_are_refused_on_a_used_folder(tmp_path: Path) -> None:
    run(small_plan(tmp_path))
    before = (tmp_path / "outcome.json").read_bytes()
    with pytest.raises(FedsgcgError) as caught:
        run(small_plan(tmp_path, seed=5))
    assert caught.value.code == "CFG-005"
    assert "seed=5" in str(caught.value)
    assert (tmp_path / "outcome.json").read_bytes() == before


@pytest.mark.row(37)
def test_a_damaged_checkpoint_costs_one_round_and_is_reported(tmp_path: Path) -> None:
    first, _ = run(small_plan(tmp_path))
    path = tmp_path / "journal" / "checkpoint-00003.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    events: list[dict[str, object]] = []
    plan = small_plan(tmp_path)
    grid = ScriptedGrid(plan, ALL)
    again = run_federation(grid, plan, events.append)
    assert again.digest == first.digest
    assert {sent.request.identity.round for sent in grid.sent if sent.kind == TRAIN} == {3}
    assert [
        str(event["where"]).rpartition("/")[2]
        for event in events
        if event["event"] == "journal.damaged"
    ] == [path.name]


def test_events_are_lines_of_json_in_order(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    plan = small_plan(tmp_path, federation__rounds=2)
    run_federation(ScriptedGrid(plan, ALL), plan, heard.append)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert lines == heard
    names = [line["event"] for line in lines if line["event"] != "round.reply"]
    rounds = ["round.started", "round.done"] * 2
    wanted = [
        "run.started",
        "sites.enrolled",
        *rounds,
        "validation.done",
        "heldout.done",
        "run.finished",
    ]
    assert names == wanted
    assert Counter(line["site"] for line in lines if line["event"] == "round.reply") == {
        "A": 2,
        "B": 2,
        "C": 2,
    }
    assert {(line["method"], line["heldout"], line["seed"], line["rounds"]) for line in lines} == {
        ("sgcg", "D", 0, 2)
    }
    assert all(np.isfinite(line["time"]) for line in lines)
