"""The journal: records are restored, damage is named, and a folder belongs to one plan."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.server.records.checkpoint import Best, RoundRecord, encode_checkpoint
from fedsgcg.server.records.journal import Journal, decisive_settings
from tests.support.plans import small_plan

SETTINGS = {"seed": 0, "method": {"name": "sgcg"}}


def record(number: int, plan: str = "plan") -> RoundRecord:
    rng = np.random.default_rng(number)
    model = Weights(
        (("a", (3, 2)), ("b", ())), rng.normal(size=7).astype(np.float32), (("steps", number),)
    )
    parts = {
        site: ClassStatistics.from_features(rng.normal(size=(30, 4)), np.repeat([0, 1, 2], 10), 3)
        for site in ("B/Süd 1", "A")[: number - 1]
    }
    rows = [
        {
            "round": number,
            "phase": "train",
            "site": site,
            "cls": "",
            "metric": "loss",
            "value": float(rng.normal()),
        }
        for site in "AB"
    ]
    return RoundRecord(
        Identity("run", "D", number, plan),
        model,
        parts,
        Best(number - 1, 0.1 * number, model) if number > 1 else None,
        aggregator_state={"momentum": rng.normal(size=5)},
        notes=(Problem("RND-404", where="round 1, B", found="no answer"),) if number > 1 else (),
        rows=tuple(rows),
    )


def journal(folder: Path) -> Journal:
    return Journal(folder, "plan", SETTINGS)


def filled(folder: Path, rounds: int) -> list[RoundRecord]:
    records = [record(number) for number in range(1, rounds + 1)]
    with journal(folder) as found:
        assert found.resume() is None
        for entry in records:
            found.commit_round(entry)
    return records


def checkpoint(folder: Path, number: int) -> Path:
    return folder / "journal" / f"checkpoint-{number:05d}.safetensors"


def assert_same(found: RoundRecord | None, wanted: RoundRecord) -> None:
    assert found is not None
    assert encode_checkpoint(found, []) == encode_checkpoint(wanted, [])


def test_nothing_to_resume_in_a_new_folder(tmp_path: Path) -> None:
    with journal(tmp_path / "new") as found:
        assert found.resume() is None
        assert found.rows() == []
        assert found.done == 0


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_last_done_round_comes_back_bit_for_bit(rounds: int, tmp_path: Path) -> None:
    records = filled(tmp_path, rounds)
    with journal(tmp_path) as found:
        back = found.resume()
        assert_same(back, records[-1])
        empty = {"other": None}  # only rows of two hospitals have the second one
        assert found.rows() == [empty | row for entry in records for row in entry.rows]
        assert found.done == rounds
        assert found.damaged == ()
    assert back is not None
    momentum = back.aggregator_state["momentum"]
    assert momentum.tobytes() == records[-1].aggregator_state["momentum"].tobytes()
    assert back.weights.values.tobytes() == records[-1].weights.values.tobytes()
    assert back.notes == records[-1].notes
    assert set(back.parts) == set(records[-1].parts)
    for site, part in records[-1].parts.items():
        for name in ("count", "mean", "scatter"):
            assert getattr(back.parts[site], name).tobytes() == getattr(part, name).tobytes()
    if rounds > 1:
        assert back.best is not None
        assert (back.best.round, back.best.score) == (rounds - 1, 0.1 * rounds)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    names = sorted(path.name for path in (tmp_path / "journal").glob("checkpoint-*"))
    assert names == ["checkpoint-00004.safetensors", "checkpoint-00005.safetensors"]
    assert len(list((tmp_path / "journal" / "rounds").iterdir())) == 5


@pytest.mark.row(12)
def test_a_checkpoint_of_an_older_version_is_refused_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr("fedsgcg.server.records.checkpoint.SCHEMA_VERSION", "1")
        filled(tmp_path, 1)
    with journal(tmp_path) as found, pytest.raises(FedsgcgError) as caught:
        found.resume()
    (problem,) = caught.value.problems
    assert (problem.code, problem.found) == ("SRV-402", "fedsgcg.checkpoint version 1")
    assert "start again in another output=FOLDER" in problem.action


def test_the_order_in_which_sites_were_remembered_changes_no_byte(tmp_path: Path) -> None:
    wanted = record(3)
    turned = replace(wanted, parts=dict(reversed(wanted.parts.items())))
    assert list(turned.parts) != list(wanted.parts)
    assert encode_checkpoint(turned, []) == encode_checkpoint(wanted, [])


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    filled(tmp_path / "one", 3)
    filled(tmp_path / "two", 3)
    assert (
        checkpoint(tmp_path / "one", 3).read_bytes() == checkpoint(tmp_path / "two", 3).read_bytes()
    )


def test_rounds_are_committed_in_order(tmp_path: Path) -> None:
    with journal(tmp_path) as found:
        with pytest.raises(ValueError, match="cannot follow"):
            found.commit_round(record(2))
        found.commit_round(record(1))
        with pytest.raises(ValueError, match="cannot follow"):
            found.commit_round(record(1))


def flip(path: Path, position: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [flip, truncate, empty])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    harm, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    records = filled(tmp_path, 3)
    harm(checkpoint(tmp_path, 3))
    with journal(tmp_path) as found:
        assert_same(found.resume(), records[1])
        assert [problem.code for problem in found.damaged] == ["SRV-402"]
        assert "checkpoint-00003" in found.damaged[0].where
        assert found.done == 2
        found.commit_round(record(3))
    with journal(tmp_path) as found:
        assert_same(found.resume(), records[2])


@pytest.mark.parametrize("position", range(0, 2000, 79))
@pytest.mark.row(37)
def test_no_changed_byte_of_a_checkpoint_goes_unnoticed(position: int, tmp_path: Path) -> None:
    records = filled(tmp_path, 2)
    path = checkpoint(tmp_path, 2)
    flip(path, position % path.stat().st_size)
    with journal(tmp_path) as found:
        back = found.resume()
        assert back is not None
        if found.damaged:
            assert_same(back, records[0])
        else:  # a space of the header's padding: nothing that was written has changed
            assert_same(back, records[1])


@pytest.mark.row(37)
def test_rows_that_were_edited_undo_their_round(tmp_path: Path) -> None:
    records = filled(tmp_path, 3)
    flip(tmp_path / "journal" / "rounds" / "00003.arrow", 200)
    with journal(tmp_path) as found:
        assert_same(found.resume(), records[1])
        assert "00003.arrow" in found.damaged[0].where


def test_without_an_intact_checkpoint_the_run_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    truncate(checkpoint(tmp_path, 2))
    truncate(checkpoint(tmp_path, 3))
    with journal(tmp_path) as found, pytest.raises(FedsgcgError) as caught:
        found.resume()
    assert caught.value.code == "SRV-402"
    assert len(caught.value.problems) == 2


def test_deleted_checkpoints_do_not_silently_start_anew(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    for number in (2, 3):
        checkpoint(tmp_path, number).unlink()
    with journal(tmp_path) as found, pytest.raises(FedsgcgError) as caught:
        found.resume()
    assert caught.value.code == "SRV-402"


@pytest.mark.row(37)
def test_a_checkpoint_of_another_round_or_plan_is_not_believed(tmp_path: Path) -> None:
    records = filled(tmp_path, 3)
    checkpoint(tmp_path, 3).write_bytes(checkpoint(tmp_path, 2).read_bytes())
    with journal(tmp_path) as found:
        assert_same(found.resume(), records[1])
        assert found.damaged
    foreign = encode_checkpoint(record(3, plan="other"), ["x"] * 3)
    checkpoint(tmp_path, 3).write_bytes(foreign)
    with journal(tmp_path) as found:
        assert_same(found.resume(), records[1])
        assert "other" in found.damaged[0].found


def test_rows_of_an_unfinished_round_are_dropped(tmp_path: Path) -> None:
    records = filled(tmp_path, 2)
    rounds = tmp_path / "journal" / "rounds"
    (rounds / "00003.arrow").write_bytes(b"half a round")
    (rounds / ".00003.arrow.tmp").write_bytes(b"half a file")
    with journal(tmp_path) as found:
        assert_same(found.resume(), records[1])
    assert sorted(path.name for path in rounds.iterdir()) == ["00001.arrow", "00002.arrow"]


@pytest.mark.row(39)
def test_a_second_user_of_the_folder_is_refused_and_the_holder_is_named(tmp_path: Path) -> None:
    with journal(tmp_path):
        with pytest.raises(FedsgcgError) as caught:
            journal(tmp_path)
        assert caught.value.code == "CFG-006"
        code = (
            "import sys, os; from pathlib import Path\n"
            "from fedsgcg.server.records.journal import Journal\n"
            "from fedsgcg.common.errors import FedsgcgError\n"
            "try: Journal(Path(sys.argv[1]), 'plan', {})\n"
            "except FedsgcgError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
        import os

        assert "CFG-006" in done.stdout
        assert f"process {os.getpid()}" in done.stdout
    journal(tmp_path).close()


@pytest.mark.row(38)
def test_a_changed_plan_is_refused_with_the_settings_that_differ(tmp_path: Path) -> None:
    before = small_plan(tmp_path)
    Journal.of_plan(before).close()
    after = small_plan(tmp_path, federation__rounds=9, prototypes__temperature=100.0)
    with pytest.raises(FedsgcgError) as caught:
        Journal.of_plan(after)
    assert {problem.code for problem in caught.value.problems} == {"CFG-005"}
    assert sorted(problem.found for problem in caught.value.problems) == [
        "federation.rounds=9",
        "prototypes.temperature=100.0",
    ]
    assert "federation.rounds=3" in str(caught.value)
    Journal.of_plan(before).close()  # the refusal has released the folder and changed nothing


def test_moving_the_data_or_the_folder_is_no_change_of_plan(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    Journal.of_plan(plan).close()
    Journal.of_plan(replace(plan, run="other", data=replace(plan.data, root="/elsewhere"))).close()


def test_decisive_settings_are_exactly_what_the_digest_covers(tmp_path: Path) -> None:
    one, other = small_plan(tmp_path), small_plan(tmp_path, network__base_width=8)
    assert decisive_settings(one) != decisive_settings(other)
    assert one.digest() != other.digest()
    moved = small_plan(tmp_path / "x", run="y", site__device="cpu")
    assert decisive_settings(one) == decisive_settings(moved)
    assert one.digest() == moved.digest()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"digest": "plan", "settings": 3}'])
def test_a_damaged_plan_file_is_named(text: str, tmp_path: Path) -> None:
    journal(tmp_path).close()
    (tmp_path / "journal" / "plan.json").write_text(text)
    with pytest.raises(FedsgcgError) as caught:
        journal(tmp_path)
    assert caught.value.code == "SRV-402"
    (tmp_path / "journal" / "plan.json").write_text(
        json.dumps({"digest": "plan", "settings": SETTINGS})
    )
    journal(tmp_path).close()
