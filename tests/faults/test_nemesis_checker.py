"""The checker of `make nemesis` accepts an honest history and finds what was broken by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.egress import payload_digest
from fedsgcg.common.wire.messages import Reply, Request, encode_reply
from tests.nemesis import checker
from tests.nemesis.history import Checkpoint, History, Sent
from tests.nemesis.merges import moment_places
from tests.nemesis.recorder import record
from tests.support.plans import small_plan
from tests.support.scripted_grid import ScriptedGrid
from tests.support.scripted_run import run

SITES = ("A", "B", "C", "D")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history of two rounds of three training hospitals and a held-out one, D."""
    folder = tmp_path_factory.mktemp("history")

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        kit, records = folder / "kits" / site, encode_reply(reply)
        (kit / "home").mkdir(parents=True, exist_ok=True)
        record(kit / "sent", records, kind)
        ledger.append(
            kit / "home" / "ledger.jsonl",
            round_number=request.identity.round,
            kind=kind,
            parts={},
            withheld=[],
            sha256=payload_digest(records),
        )
        return reply

    plan = small_plan(folder / "run", federation__rounds=2)
    outcome, _ = run(plan, SITES, script=script)
    assert outcome.status == "completed", outcome
    shutil.copytree(folder / "run" / "journal", folder / "checkpoints" / "0")
    (folder / "coordinator").mkdir()
    lines: list[dict[str, Any]] = [
        {
            "event": "federation",
            "training": ["A", "B", "C"],
            "heldout": "D",
            "kits": {site: "kits/" + site for site in SITES},
            "coordinator": ["coordinator", "run"],
            "secrets": ["MUSTERMANN"],
            "limits": {"round_s": 60, "reply_bytes": 10**7, "rss_mb": 100},
        },
        {"event": "memory", "process": "serve", "pid": 1, "rss_mb": 99},
        {
            "event": "study",
            "study": "0",
            "folder": "run",
            "rounds": 2,
            "status": "completed",
            "simulated": outcome.digest,
        },
    ]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture
def copy(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the honest history, in the current folder."""
    folder = tmp_path / "copy"
    shutil.copytree(honest, folder)
    monkeypatch.chdir(folder)
    return folder


def invariants(folder: Path) -> set[str]:
    return {violation.invariant for violation in checker.check(History.read(folder))}


def test_an_honest_history_holds(copy: Path) -> None:
    assert checker.check(History.read(copy)) == []


def void_round(folder: Path) -> None:
    """Say that the second round was void, as if too few replies had been admitted."""
    problem = {"code": "RND-421", "found": "1 admitted", "where": "round 2"}
    change_json(folder / "run" / "outcome.json", status="degraded", problems=[problem])


def test_a_void_round_keeps_the_model_of_the_round_before(copy: Path) -> None:
    void_round(copy)
    found = [violation.found for violation in checker.check(History.read(copy))]
    assert "a void round changed the model" in found
    before = load_file(checkpoint(copy, 1))["weights"]
    change_tensor(checkpoint(copy), "weights", lambda _: before)
    found = [violation.found for violation in checker.check(History.read(copy))]
    assert "a void round changed the model" not in found


def rounds_file(folder: Path, number: int = 2) -> Path:
    return folder / "run" / "journal" / "rounds" / f"{number:05d}.arrow"


def checkpoint(folder: Path, number: int = 2) -> Path:
    return folder / "checkpoints" / "0" / f"checkpoint-{number:05d}.safetensors"


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    tensors = load_file(path)
    tensors[name] = change(tensors[name].copy())
    path.write_bytes(save(tensors, metadata=header["__metadata__"]))


def lost_rows(folder: Path) -> None:
    rounds_file(folder, 1).unlink()


def other_checkpoint_of_a_round(folder: Path) -> None:
    data = checkpoint(folder).read_bytes()
    (folder / "checkpoints/0/checkpoint-00002-b.safetensors").write_bytes(data + b"x")


def forgotten_round(folder: Path) -> None:
    path = folder / "run" / "events.jsonl"
    lines = path.read_text().splitlines()
    again = json.loads(lines[0]) | {"event": "run.started", "round": 0}
    at = next(place for place, line in enumerate(lines) if '"round.done"' in line)
    path.write_text("\n".join([*lines[: at + 1], json.dumps(again), *lines[at + 1 :]]))


def moved_weight(folder: Path) -> None:
    def change(values: Any) -> Any:
        values[0] = np.nextafter(np.nextafter(values[0], 9), 9)
        return values

    change_tensor(checkpoint(folder), "weights", change)


def moved_moment(folder: Path) -> None:
    layout = Checkpoint.read(checkpoint(folder)).layout
    place = int(np.flatnonzero(moment_places(layout))[0])

    def change(values: Any) -> Any:
        values[place] += 0.1
        return values

    change_tensor(checkpoint(folder), "weights", change)


def poisoned_reply(folder: Path) -> None:
    for path in (folder / "kits/B/sent").glob("*.npz"):
        with np.load(path) as file:
            entries = {name: file[name] for name in file.files}
        facts = json.loads(entries["facts"].tobytes()) | {"poison": "planted"}
        entries["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        np.savez(path, **entries)


def counted_twice(folder: Path) -> None:
    path = rounds_file(folder)
    with pa.ipc.open_file(path) as reader:
        table = reader.read_all()
    row = next(
        row for row in table.to_pylist() if (row["phase"], row["metric"]) == ("train", "examples")
    )
    more = pa.concat_tables([table, pa.Table.from_pylist([row], schema=table.schema)])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, more.schema) as writer:
        writer.write_table(more)


def other_part(folder: Path) -> None:
    path = checkpoint(folder)
    one = load_file(path)["part/A"]
    change_tensor(path, "part/B", lambda values: one)


def other_prototypes(folder: Path) -> None:
    shutil.copy(next(iter(parts_of(folder))), folder / "run" / "prototypes.arrow")


def parts_of(folder: Path) -> list[Path]:
    path = folder / "part.arrow"
    path.write_bytes(load_file(checkpoint(folder, 1))["part/A"].tobytes())
    return [path]


def edited_ledger(folder: Path) -> None:
    path = folder / "kits/A/home/ledger.jsonl"
    path.write_text(path.read_text().replace('"round": 1', '"round": 7', 1))


def cut_ledger(folder: Path) -> None:
    path = folder / "kits/A/home/ledger.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def heldout_trained(folder: Path) -> None:
    sent = sorted((folder / "kits/A/sent").glob("*.npz"))
    kinds = {path: Sent.read(path).kind for path in sent}
    trained = next(path for path in sent if kinds[path] == "train")
    shutil.copy(trained, folder / "kits/D/sent" / trained.name)


def other_model_than_simulated(folder: Path) -> None:
    path = folder / "history.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["simulated"] = "0" * 64
    path.write_text("\n".join(map(json.dumps, lines)))


def degraded_without_reason(folder: Path) -> None:
    change_json(folder / "run/outcome.json", status="degraded")


def completed_too_early(folder: Path) -> None:
    change_json(folder / "run/outcome.json", rounds_done=1)


def leaked(folder: Path) -> None:
    (folder / "coordinator/server.log").write_text("cannot read MUSTERMANN_001.nii.gz")


def slow_round(folder: Path) -> None:
    path = folder / "run/events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        event["time"] += 100 * (event["event"] == "round.done")
    path.write_text("\n".join(map(json.dumps, events)))


def large_process(folder: Path) -> None:
    path = folder / "history.jsonl"
    path.write_text(path.read_text().replace('"rss_mb": 99', '"rss_mb": 101'))


def pause_without_a_refusal(folder: Path) -> None:
    path = folder / "run/events.jsonl"
    lines = path.read_text().splitlines()
    at = next(place for place, line in enumerate(lines) if '"round.done"' in line)
    paused = json.loads(lines[at]) | {"event": "site.paused", "site": "B", "until": 4}
    path.write_text("\n".join([*lines[:at], json.dumps(paused), *lines[at:]]))


BROKEN: dict[Callable[[Path], None], str] = {
    lost_rows: "I1",
    other_checkpoint_of_a_round: "I1",
    forgotten_round: "I1",
    moved_weight: "I2",
    moved_moment: "I2",
    poisoned_reply: "I2",
    counted_twice: "I3",
    other_part: "I4",
    other_prototypes: "I4",
    edited_ledger: "I5",
    cut_ledger: "I5",
    heldout_trained: "I6",
    other_model_than_simulated: "I7",
    degraded_without_reason: "I8",
    completed_too_early: "I8",
    leaked: "I9",
    slow_round: "I10",
    large_process: "I10",
    pause_without_a_refusal: "I11",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_history_that_was_broken_by_hand_is_found(
    damage: Callable[[Path], None], copy: Path
) -> None:
    damage(copy)
    assert BROKEN[damage] in invariants(copy)
