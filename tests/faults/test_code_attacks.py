"""Attacks on the code that runs at a hospital: only what was approved may run."""

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from fedsgcg.clients.guard.approval import approve, approved_software, bundle_store, read_bundle
from fedsgcg.clients.guard.software import Software, changed_files, software_changes
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.isolated import isolated
from fedsgcg.deploy.site.commands import environment, resident_command, supernode_command
from fedsgcg.deploy.site.resident import Resident
from tests.faults.test_resident_faults import APP, asked, error_of, files, policy, resident
from tests.unit.clients.test_approval import fab
from tests.unit.clients.test_policy import policy_for

__all__ = ["policy", "resident"]  # fixtures


def planted(folder: Path, module: str, proof: Path) -> Path:
    """Bytecode in `__pycache__` that Python prefers to the source of a module, whatever its age."""
    source = folder / "evil.source"
    source.write_text(f"open({str(proof)!r}, 'w')\n" + APP)
    place = folder / "__pycache__" / f"{module}.{sys.implementation.cache_tag}.pyc"
    place.parent.mkdir(exist_ok=True)
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), cfile=str(place), invalidation_mode=mode, doraise=True)
    source.unlink()
    return place


@pytest.mark.attack("planted-bytecode")
def test_bytecode_planted_next_to_approved_code_does_not_run(resident, policy, tmp_path):
    """Attack: a `.pyc` below the unpacked bundle, between two starts of the worker."""
    assert asked(resident, "go")["facts"]["calls"] == 1
    resident._end_worker()
    (folder,) = (path for path in bundle_store(Path(policy.approved)).iterdir() if path.is_dir())
    planted(folder / "clients", "app", tmp_path / "proof")
    assert asked(resident, "go")["facts"]["calls"] == 1
    assert not (tmp_path / "proof").exists()
    assert not list(folder.rglob("__pycache__"))


@pytest.mark.attack("planted-bytecode")
def test_code_written_into_the_folder_of_a_running_bundle_does_not_run(resident, policy, tmp_path):
    """Attack: a module that is imported late is exchanged after the check."""
    late = APP.replace(
        "calls.append(1)",
        "calls.append(1)\n    if word_of(message):\n        import clients.late",
    )
    late += "\ndef word_of(message):\n    return message.content['message']['word'] == 'late'\n"
    late = late.replace("import clients.late", "from fedsgcg.clients import late")
    code = {**files(late), "clients/late.py": "FACT = 1\n"}
    approve(read_bundle(fab(code)), Path(policy.approved), "test")
    resident_answer = asked_bundle(resident, "go", code)
    folder = Path(resident_answer["facts"]["file"]).parent
    (folder / "late.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\n")
    assert "facts" in asked_bundle(resident, "late", code)
    (folder / "extra.py").write_text("")
    assert not (tmp_path / "proof").exists()


def asked_bundle(resident: Resident, word: str, code: dict[str, str]):
    """What the resident answers to a message for a whole bundle."""
    import time

    from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict

    from tests.faults.test_resident_faults import IDENTITY

    content = RecordDict({"message": ConfigRecord({"identity": IDENTITY.encode(), "word": word})})
    metadata = Metadata(1, "7", 0, 1, "", "", time.time(), 600.0, "train")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    reply, _ = resident._answer(Message(content, metadata=metadata), context, fab(code), 1)
    return reply.content


@pytest.mark.attack("python-path")
def test_a_python_path_in_the_environment_reaches_no_process_of_a_site(tmp_path, monkeypatch):
    """Attack: `PYTHONPATH` with a `sitecustomize` and a module of the same name as one here."""
    proof = tmp_path / "proof"
    evil = tmp_path / "evil"
    (evil / "fedsgcg").mkdir(parents=True)
    for name in ("sitecustomize.py", "httpx.py", "fedsgcg/__init__.py"):
        (evil / name).write_text(f"open({str(proof)!r}, 'w')\n")
    for name, text in {
        "PYTHONPATH": str(evil),
        "PYTHONSTARTUP": str(evil / "httpx.py"),
        "LD_PRELOAD": str(evil / "x.so"),
    }.items():
        monkeypatch.setenv(name, text)
    policy = policy_for(tmp_path, tmp_path)
    variables = environment(policy)
    assert not [name for name in variables if name.startswith(("PYTHONPATH", "PYTHONST", "LD_P"))]
    for command in (
        resident_command(tmp_path / "site.yaml", 1, tmp_path / "s", False),
        supernode_command(policy, tmp_path / "site.yaml", 1, tmp_path / "s"),
    ):
        assert command[1:5] == ["-I", "-B", "-X", "pycache_prefix=/dev/null"]
    done = subprocess.run(
        [*isolated("fedsgcg.deploy.site.resident"), str(tmp_path / "none"), "x", "y"],
        env={**os.environ, "LD_PRELOAD": ""},
        cwd=evil,
        capture_output=True,
        text=True,
    )
    assert "DEP-601" in done.stderr, done.stderr
    assert not proof.exists()


@pytest.mark.attack("changed-package")
def test_a_package_that_changed_since_the_approval_stops_everything(resident, policy):
    """Attack: another torch or Flower under an approved bundle."""
    path = Path(policy.approved)
    tree = json.loads(path.read_text())
    tree["software"]["distributions"]["flwr"] = "1.42.0 " + "0" * 64
    path.write_text(json.dumps(tree))
    assert error_of(asked(resident, "go")) == "POL-708"
    approve(read_bundle(fab(files(APP))), path, "test")
    assert "facts" in asked(resident, "go")


def test_an_approval_without_a_list_of_the_software_is_asked_for_again(resident, policy):
    path = Path(policy.approved)
    tree = json.loads(path.read_text())
    del tree["software"]
    path.write_text(json.dumps(tree))
    assert approved_software(path) is None
    assert error_of(asked(resident, "go")) == "POL-708"


def test_a_node_that_was_started_before_the_software_changed_is_restarted(resident, policy):
    resident.software = Software("CPython 3.9.0", "0" * 64)
    assert error_of(asked(resident, "go")) == "POL-708"
    (line,) = (Path(policy.home) / "ledger.jsonl").read_text().splitlines()
    assert "fedsgcg-site leave" in line


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of one distribution with a package and a RECORD."""
    import base64
    import hashlib

    folder = tmp_path / "library"
    info = folder / "tool-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "tool").mkdir()
    (folder / "tool/__init__.py").write_text("VALUE = 1\n")
    digest = hashlib.sha256((folder / "tool/__init__.py").read_bytes()).digest()
    text = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"tool/__init__.py,sha256={text},10\ntool/x.pyc,,\n")
    return folder


def test_the_lock_shows_every_kind_of_change(library, tmp_path):
    program = tmp_path / "program"
    program.mkdir()
    (program / "a.py").write_text("1")
    before = Software.installed([library], program)
    assert Software.from_tree(json.loads(json.dumps(before.as_tree()))) == before
    (program / "__pycache__").mkdir()
    (program / "__pycache__/a.cpython-311.pyc").write_text("never read")
    assert Software.installed([library], program) == before

    (program / "a.cpython-311-x86_64-linux-gnu.so").write_text("loaded before a.py")
    (library / "evil.pth").write_text("import os\n")
    (library / "sitecustomize.py").write_text("")
    (library / "tool-1.0.dist-info/RECORD").write_text("")
    other = library / "other-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    lines = software_changes(before, Software.installed([library], program))
    starts = [line.split()[:2] for line in lines]
    assert ["changed", "fedsgcg's"] in starts
    assert sum("evil.pth" in line or "sitecustomize.py" in line for line in lines) == 2
    assert ["changed", "tool"] in starts
    assert ["new", "other"] in starts
    assert len(lines) == 5
    assert all("->" in line for line in lines if line.startswith("changed"))


def test_installed_files_are_compared_with_the_record_of_their_package(library):
    """Attack: a changed library whose version and RECORD stay the same."""
    (library / "tool/x.pyc").write_text("")
    assert list(changed_files([library])) == []
    (library / "tool/__init__.py").write_text("VALUE = 2\n")
    (library / "tool/__init__.cpython-311-x86_64-linux-gnu.so").write_text("")
    found = sorted(changed_files([library]))
    assert [line.split(":")[0] for line in found] == ["changed", "in no distribution"]
    (library / "tool/__init__.py").unlink()
    assert sorted(changed_files([library]))[1].startswith("missing: ")


def test_an_approvals_file_with_a_damaged_lock_approves_nothing(resident, policy):
    path = Path(policy.approved)
    tree = json.loads(path.read_text())
    tree["software"] = {"python": 3}
    path.write_text(json.dumps(tree))
    with pytest.raises(FedsgcgError, match="POL-705"):
        approved_software(path)
    assert error_of(asked(resident, "go")) == "POL-705"
