"""Attacks on finished files: an edited result, model or checkpoint is noticed."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.files.seals import SEAL, broken_seal, write_seal
from fedsgcg.common.files.signing import KIT, Signer
from fedsgcg.common.run_folder.paths import SEALED
from fedsgcg.deploy import certificates
from fedsgcg.deploy.cli import coordinator
from fedsgcg.server.records.checkpoint import encode_checkpoint
from fedsgcg.server.records.journal import Journal
from fedsgcg.server.report.study_files import changed_files
from tests.support.report_study import write_study
from tests.unit.server.test_journal import record

NAMES = ("a", "b", "c")


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A coordinator's kit with a folder of runs."""
    folder = tmp_path / "coordinator"
    (folder / "runs/study/sgcg/West/0").mkdir(parents=True)
    (folder / "project.yaml").touch()
    authority = certificates.make_authority("test")
    certificates.write_authority(folder, authority)
    pair = certificates.make_server_certificate(authority, ["localhost"])
    certificates.write_server(folder, *pair)
    return folder


def fill(folder: Path, signer: Signer | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        (folder / name).write_text(name)
    write_seal(Disk(), folder, NAMES, signer)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.attack("edited-results")
def test_every_change_of_a_sealed_folder_is_noticed(kit: Path, tmp_path: Path, signed) -> None:
    folder = kit / "runs/cell" if signed else tmp_path / "cell"
    fill(folder, Signer.of_kit(kit) if signed else None)
    assert broken_seal(folder, NAMES) == {}
    (folder / "a").write_text("A")
    (folder / "b").unlink()
    (folder / "c").write_text("new")
    assert broken_seal(folder, NAMES) == {
        "a": "changed after the run",
        "b": "removed after the run",
        "c": "changed after the run",
    }
    (folder / SEAL).write_text("{}")
    assert list(broken_seal(folder, NAMES)) == [SEAL]


def test_a_seal_written_anew_lacks_the_coordinators_signature(kit: Path, tmp_path: Path) -> None:
    """Attack: result and seal are both replaced, without the server's key."""
    folder = kit / "runs/cell"
    fill(folder, Signer.of_kit(kit))
    (folder / "a").write_text("A")
    write_seal(Disk(), folder, NAMES, None)
    assert broken_seal(folder, NAMES) == {SEAL: "a seal without the coordinator's signature"}
    other = tmp_path / "other"
    other.mkdir()
    stranger = certificates.make_authority("stranger")
    certificates.write_server(other, *certificates.make_server_certificate(stranger, ["localhost"]))
    write_seal(Disk(), folder, NAMES, Signer.of_kit(other))
    assert broken_seal(folder, NAMES) == {SEAL: "a seal that the coordinator did not sign"}


def test_seals_stay_valid_after_the_servers_certificate_was_renewed(kit: Path) -> None:
    fill(kit / "runs/cell", Signer.of_kit(kit))
    pair = certificates.make_server_certificate(certificates.read_authority(kit), ["localhost"])
    certificates.write_server(kit, *pair)
    assert broken_seal(kit / "runs/cell", NAMES) == {}


def journal(kit: Path, monkeypatch: pytest.MonkeyPatch, *, signed: bool = True) -> Journal:
    monkeypatch.setenv(KIT, str(kit)) if signed else monkeypatch.delenv(KIT, raising=False)
    folder = kit / "runs/study/sgcg/West/0"
    return Journal(folder, "plan", {}, None, Signer.of_process())


@pytest.mark.attack("edited-journal")
def test_an_edited_checkpoint_is_not_resumed(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: another model in a checkpoint whose own hash was computed anew."""
    with journal(kit, monkeypatch) as book:
        for number in (1, 2, 3):
            book.commit_round(record(number))
    folder = kit / "runs/study/sgcg/West/0/journal"
    assert len(list(folder.glob("*.seal.json"))) == 2
    newest = folder / "checkpoint-00003.safetensors"
    hashes = journal_hashes(kit, monkeypatch)
    three = record(3)
    other = replace(three, weights=replace(three.weights, values=three.weights.values + 1))
    newest.write_bytes(encode_checkpoint(other, hashes))
    with journal(kit, monkeypatch) as book:
        assert book.resume().round == 2
        (problem,) = book.damaged
        assert (problem.code, problem.found) == ("SRV-402", "changed after the run")


def test_a_checkpoint_without_its_seal_is_not_resumed(kit: Path, monkeypatch) -> None:
    with journal(kit, monkeypatch) as book:
        book.commit_round(record(1))
    folder = kit / "runs/study/sgcg/West/0/journal"
    for path in folder.glob("*.seal.json"):
        path.unlink()
    with journal(kit, monkeypatch) as book, pytest.raises(FedsgcgError, match="no seal"):
        book.resume()


def test_a_journal_of_before_and_one_of_a_simulation_resume(kit: Path, monkeypatch) -> None:
    with journal(kit, monkeypatch, signed=False) as book:
        book.commit_round(record(1))
    with journal(kit, monkeypatch) as book:
        assert book.resume().round == 1
        book.commit_round(record(2))
    with journal(kit, monkeypatch) as book:
        assert book.resume().round == 2


def journal_hashes(kit: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    with journal(kit, monkeypatch) as book:
        book.resume()
        return list(book._hashes)


@pytest.mark.attack("edited-results")
def test_an_edited_result_is_in_the_banner_and_in_the_exit_code(tmp_path: Path, capsys) -> None:
    """Attack: better numbers in `results.parquet`, between the run and the report."""
    folder = tmp_path / "study"
    write_study(folder)
    (cell, *_) = sorted(path.parent for path in folder.glob("*/*/*/results.parquet"))
    write_seal(Disk(), cell, SEALED, None)
    assert coordinator.main(["report", str(folder)]) == 0
    assert changed_files(folder) == []
    table = pq.read_table(cell / "results.parquet")
    better = table.set_column(
        table.column_names.index("dice"), "dice", [[1.0] * table.num_rows]
    ).cast(table.schema)
    pq.write_table(better, cell / "results.parquet")
    (problem,) = changed_files(folder)
    assert problem.code == "SRV-403"
    assert coordinator.main(["report", str(folder)]) == 1
    assert "SRV-403" in capsys.readouterr().out
    assert "SRV-403" in (folder / "report.html").read_text()
    assert json.loads((cell / SEAL).read_text())["files"]
