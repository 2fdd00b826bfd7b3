"""Machines without file locks, home directory, user name or a short temporary folder."""

import errno
import fcntl
import getpass
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedsgcg.clients.data.cache import cache_folder, locked
from fedsgcg.clients.guard import ledger
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files import system
from fedsgcg.common.files.system import expand, has_home, lock, user_name
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.flower_run import plan_of_run
from fedsgcg.deploy.prepare.conversion import claimed
from fedsgcg.deploy.site.supervisor import joined_pid, only_one
from fedsgcg.deploy.study.runtimes import LONGEST_TEMPORARY, ray_arguments, short_folder
from fedsgcg.server.records.journal import lock_file

ROOT = Path(__file__).resolve().parents[3]
PLACES = {
    "run folder": (lambda folder: lock_file(folder / "lock"), "output="),
    "prepared data": (
        lambda folder: claimed(folder / "out", "manifest", folder / "in").__enter__(),
        "-o",
    ),
    "slice cache": (lambda folder: locked(folder / "c.lock").__enter__(), "site.cache"),
    "join": (lambda folder: only_one(folder).__enter__(), "home in site.yaml"),
    "joined": (
        lambda folder: (folder / "join.lock").touch() or joined_pid(folder),
        "home in site.yaml",
    ),
    "ledger": (
        lambda folder: ledger.append(
            folder / "ledger.jsonl", round_number=1, kind="train", parts={}, withheld=(), sha256=""
        ),
        "home in site.yaml",
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", sorted(system.NO_LOCKS))
def test_a_file_system_without_locks_is_named_with_the_setting_of_the_folder(
    place, number, tmp_path, monkeypatch
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    work, setting = PLACES[place]
    with pytest.raises(FedsgcgError) as caught:
        work(tmp_path)
    assert caught.value.code == "CFG-008"
    assert setting in caught.value.problems[0].action
    assert str(tmp_path) in caught.value.problems[0].where


def test_locks_are_taken_by_one_function_alone():
    users = [
        path
        for room in ("clients", "common", "deploy", "server")
        for path in (ROOT / room).rglob("*.py")
    ]
    assert [path.name for path in users if re.search(r"\b(flock|lockf)\(", path.read_text())] == [
        "system.py"
    ]
    assert [
        str(path)
        for path in users
        if path.name != "system.py"
        and re.search(r"expanduser\(|Path\.home\(|getuser\(", path.read_text())
    ] == []


def test_a_lock_excludes_another_open_file_until_it_is_closed(tmp_path):
    with (tmp_path / "lock").open("a") as one, (tmp_path / "lock").open("a") as other:
        assert lock(one, action="")
        assert not lock(other, action="")
        one.close()
        assert lock(other, action="", wait=True)


def test_another_failure_of_a_lock_stays_what_it_is(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(FedsgcgError, match="SRV-401"):
        lock_file(tmp_path / "lock")
    with pytest.raises(FedsgcgError, match="DAT-113"), locked(tmp_path / "lock"):
        pass


@pytest.fixture
def nobody(monkeypatch):
    """A user of whom the machine knows nothing but the number."""

    def unknown(*_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "FEDSGCG_HOME", "FEDSGCG_CACHE", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_directory_the_setting_to_make_is_named(nobody, monkeypatch, tmp_path):
    assert not has_home()
    for work, setting in (
        (lambda: cache_folder(""), "FEDSGCG_CACHE"),
        (lambda: plan_of_run(join(["data=promise12"]), {}, 1), "FEDSGCG_HOME"),
        (lambda: expand("~/x", "data.root"), "data.root"),
    ):
        with pytest.raises(FedsgcgError) as caught:
            work()
        assert caught.value.code == "CFG-009"
        assert setting in caught.value.problems[0].action
    assert expand("/data", "data.root") == Path("/data")
    monkeypatch.setenv("FEDSGCG_CACHE", str(tmp_path))
    assert cache_folder("") == tmp_path


def test_a_user_without_a_name_has_a_number(nobody):
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    assert user_name() == f"uid {os.getuid()}"


def test_flower_is_given_a_home_where_there_is_none(nobody, monkeypatch):
    from fedsgcg.deploy.environment import prepare_environment

    monkeypatch.delenv("FLWR_HOME", raising=False)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    prepare_environment()
    assert Path(os.environ["FLWR_HOME"]).is_dir()
    monkeypatch.delenv("FLWR_HOME")


def test_a_temporary_folder_that_is_too_long_for_a_socket_is_not_taken(monkeypatch, tmp_path):
    from fedsgcg.deploy.study.preflight import Machine

    assert short_folder("/" + "x" * (LONGEST_TEMPORARY - 1)) == ""
    other = short_folder("/" + "x" * LONGEST_TEMPORARY)
    assert Path(other).is_dir()
    assert len(f"{other}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") <= 107
    with pytest.raises(FedsgcgError, match="RAY_TMPDIR") as caught:
        short_folder("/" + "x" * LONGEST_TEMPORARY, [str(tmp_path / "absent"), "/" + "y" * 60])
    assert caught.value.code == "CFG-010"
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(
        "TMPDIR", "/ünï" + "x" * (LONGEST_TEMPORARY - 5)
    )  # bytes count, not characters
    assert ray_arguments(Machine(1, 0), "local")["_temp_dir"] == other
    assert "_temp_dir" not in ray_arguments(Machine(1, 0), "auto")


def test_ray_starts_with_a_long_temporary_folder(tmp_path):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    code = (
        "import ray; from fedsgcg.deploy.study.runtimes import *; "
        "from fedsgcg.deploy.study.preflight import Machine; "
        "prepare_environment(); "
        "ray.init(**ray_arguments(Machine(1, 0), 'local')); ray.shutdown(); print('started')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"} | {
        "TMPDIR": str(long)
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("started\n"), done.stderr
