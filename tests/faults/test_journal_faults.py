"""The disk fails at every operation in turn: no completed round is lost.

The resumed run ends with the same bytes.
"""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fedsgcg.server.federation
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.disk import Disk
from fedsgcg.server.federation import Outcome, initial_weights, run_federation
from fedsgcg.server.records.checkpoint import RoundRecord
from fedsgcg.server.records.journal import Journal
from tests.support.plans import small_plan
from tests.support.scripted_grid import ScriptedGrid
from tests.unit.server.test_journal import SETTINGS, record

ROUNDS = 4
OWN = ("lock", "events.jsonl", "outcome.json", "seal.json")
"""Files that state when a run took place, or the hash of one that does."""


class PowerCut(BaseException):
    """The process is gone."""


class FaultyDisk(Disk):
    """A real disk whose n-th operation, and every later one, does not happen.

    Modes: `refuse` = the operating system says there is no space; `before` and `after` = the power
    is cut before or after the operation; `torn` = it is cut when half of the bytes of a file are
    written.
    """

    def __init__(self, nth: int, mode: str) -> None:
        self.nth, self.mode, self.count = nth, mode, 0

    def make_folder(self, folder: Path) -> None:
        self._do(lambda: Disk.make_folder(self, folder))

    def put(self, path: Path, data: bytes) -> None:
        self._do(
            lambda: Disk.put(self, path, data), lambda: path.write_bytes(data[: len(data) // 2])
        )

    def replace(self, source: Path, target: Path) -> None:
        self._do(lambda: Disk.replace(self, source, target))

    def settle(self, folder: Path) -> None:
        self._do(lambda: Disk.settle(self, folder))

    def remove(self, path: Path) -> None:
        self._do(lambda: Disk.remove(self, path))

    @property
    def failed(self) -> bool:
        return self.count >= self.nth

    def _do(self, work: Callable[[], object], half: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count < self.nth:
            work()
            return
        if self.mode == "refuse":
            half()
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.count == self.nth:
            {"before": lambda: None, "torn": half, "after": work}[self.mode]()
        raise PowerCut


def write_rounds(folder: Path, disk: Disk, committed: list[int]) -> None:
    """Go on from the last done round to the last one."""
    with Journal(folder, "plan", SETTINGS, disk) as journal:
        found = journal.resume()
        start = found.round if found else 0
        assert start >= max(committed, default=0), "a round that was reported as done is gone"
        for number in range(start + 1, ROUNDS + 1):
            journal.commit_round(record(number))
            committed.append(number)


def content(folder: Path, *left_out: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in left_out
    }


@pytest.mark.parametrize("mode", ["refuse", "before", "torn", "after"])
@pytest.mark.row(35)
def test_whatever_operation_fails_the_journal_ends_the_same(mode: str, tmp_path: Path) -> None:
    write_rounds(tmp_path / "whole", Disk(), [])
    wanted = content(tmp_path / "whole", "lock")
    nth, ends = 0, list[str]()
    while True:
        nth += 1
        folder, disk, committed = tmp_path / str(nth), FaultyDisk(nth, mode), list[int]()
        try:
            write_rounds(folder, disk, committed)
        except (FedsgcgError, PowerCut) as error:
            ends.append(getattr(error, "code", "power cut"))
        if not disk.failed:
            break
        write_rounds(folder, Disk(), committed)
        assert content(folder, "lock") == wanted, f"operation {nth}"
    assert nth > 25, "the loop must have met every write of four rounds"
    assert ends == ["SRV-401" if mode == "refuse" else "power cut"] * (nth - 1)


@pytest.mark.parametrize("mode", ["refuse", "torn"])
def test_the_last_checkpoint_is_intact_after_any_failure(mode: str, tmp_path: Path) -> None:
    for nth in range(12, 30):
        folder, committed = tmp_path / str(nth), list[int]()
        with pytest.raises((FedsgcgError, PowerCut)):
            write_rounds(folder, FaultyDisk(nth, mode), committed)
        with Journal(folder, "plan", SETTINGS) as journal:
            found = journal.resume()
            assert journal.damaged == ()
            assert (found.round if found else 0) >= max(committed, default=0)


def federate(folder: Path, disk: Disk | None = None) -> Outcome:
    plan = small_plan(folder, federation__rounds=2, federation__selection="source_validation")
    return run_federation(ScriptedGrid(plan, ("A", "B", "C", "D")), plan, disk=disk)


@pytest.mark.parametrize("mode", ["refuse", "torn"])
@pytest.mark.row(35)
def test_whatever_operation_fails_the_run_ends_the_same(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = initial_weights(small_plan(tmp_path))
    monkeypatch.setattr(fedsgcg.server.federation, "initial_weights", lambda plan: start)
    whole = federate(tmp_path / "whole")
    assert whole.status == "completed"
    wanted = content(tmp_path / "whole", *OWN)
    assert "results.parquet" in wanted
    # A refusal leaves the process in charge of its own end, a torn write does not: the latter is
    # tried everywhere.
    nth, step, ends = 0, {"torn": 1, "refuse": 4}[mode], set[str]()
    while True:
        nth += step
        folder, disk = tmp_path / str(nth), FaultyDisk(nth, mode)
        try:
            outcome = federate(folder, disk)
            if disk.failed:
                assert outcome.status == "failed", f"operation {nth}"
                assert outcome.failure[0].code == "SRV-401"
        except (FedsgcgError, PowerCut) as error:  # refused: the journal could not even be opened
            ends.add(getattr(error, "code", "power cut"))
        if not disk.failed:
            break
        again = federate(folder)
        assert (again.status, again.digest) == ("completed", whole.digest), f"operation {nth}"
        assert content(folder, *OWN) == wanted, f"operation {nth}"
    assert nth > 30
    assert ends == {"SRV-401" if mode == "refuse" else "power cut"}


@pytest.mark.row(36)
def test_a_real_file_size_limit_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from fedsgcg.common.errors import FedsgcgError\n"
        "from fedsgcg.server.records.journal import Journal\n"
        "from tests.unit.server.test_journal import SETTINGS, record\n"
        "journal = Journal(Path(sys.argv[1]), 'plan', SETTINGS); journal.resume()\n"
        "journal.commit_round(record(1))\n"
        # Less than a checkpoint with prototypes.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "try: journal.commit_round(record(2))\n"
        "except FedsgcgError as error: print(error)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    assert "SRV-401" in done.stdout
    assert "too large" in done.stdout
    with Journal(tmp_path, "plan", SETTINGS) as journal:
        found = journal.resume()
        assert isinstance(found, RoundRecord)
        assert found.round == 1
        assert journal.damaged == ()
        journal.commit_round(record(2))


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(FedsgcgError) as caught:
        Journal(tmp_path / "run", "plan", SETTINGS)
    assert caught.value.code == "SRV-401"
    assert str(tmp_path / "run") in str(caught.value)
