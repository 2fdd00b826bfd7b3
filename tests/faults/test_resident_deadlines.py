"""Every wait of the resident has a deadline, and `join` watches the resident itself."""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict

from fedsgcg.clients.guard.approval import approve, bundle_store, read_bundle
from fedsgcg.clients.guard.site_file import SiteFile, write_site_file
from fedsgcg.deploy.site import resident as resident_module
from fedsgcg.deploy.site import supervisor
from fedsgcg.deploy.site.commands import ALIVE
from fedsgcg.deploy.site.resident import MOST_DEADLINE_S, Resident
from fedsgcg.deploy.site.supervisor import Join, expect_pulse, prepare_home, silent_s
from fedsgcg.deploy.site.worker import receive_frame, send_frame
from tests.faults.test_resident_faults import APP, IDENTITY, asked, error_of, files
from tests.unit.clients.test_approval import fab
from tests.unit.clients.test_policy import policy_for

DEAF = """
    if word == "deaf":  # closes its socket and stays
        os.closerange(3, 200)
        time.sleep(60)
    if word == "half":  # starts a reply and stays
        import socket, sys
        link = socket.socket(fileno=int(sys.argv[1]))  # kept, and so open
        link.sendall((10**6).to_bytes(8, "big"))
        time.sleep(60)
    if word == "huge":  # states a reply of 2^62 bytes
        import socket, sys
        link = socket.socket(fileno=int(sys.argv[1]))
        link.sendall((2**62).to_bytes(8, "big"))
        time.sleep(60)
"""
STUBBORN = APP.replace('    if word == "die":', DEAF.strip("\n") + '\n    if word == "die":')


@pytest.fixture
def policy(tmp_path: Path) -> SiteFile:
    made = policy_for(tmp_path, tmp_path, deadline_s=60.0)
    approve(read_bundle(fab(files(STUBBORN))), Path(made.approved), "test")
    return made


@pytest.fixture
def resident(policy: SiteFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resident_module, "ENDED_S", 1.0)
    made = Resident(policy, "127.0.0.1:1", b"secret")
    yield made
    made._end_worker()


@pytest.mark.parametrize(
    ("word", "code"), [("deaf", "SITE-504"), ("huge", "SITE-504"), ("half", "SITE-503")]
)
@pytest.mark.attack("silent-worker")
def test_row_29_a_worker_that_lives_but_does_not_answer_is_ended(
    word: str, code: str, resident: Resident, policy: SiteFile
) -> None:
    """Row 29: the resident waited for the end of a living process, for ever."""
    pid = asked(resident, "go", STUBBORN)["facts"]["pid"]
    resident.policy = replace(policy, deadline_s=3.0 if word == "half" else 60.0)
    assert error_of(asked(resident, word, STUBBORN)) == code
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.attack("unwritable-bundle")
def test_row_57_an_unapproved_bundle_with_a_long_name_is_refused_and_the_site_goes_on(
    resident: Resident,
) -> None:
    """Row 57: a name of 300 characters cannot be unpacked for comparison."""
    content = RecordDict({"message": ConfigRecord({"identity": IDENTITY.encode(), "word": "go"})})
    metadata = Metadata(1, "7", 0, 1, "", "", time.time(), 600.0, "train")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    bundle = fab(files(APP) | {"clients/" + "n" * 300 + ".py": ""})
    reply, _ = resident._answer(Message(content, metadata=metadata), context, bundle, 1)
    assert error_of(reply.content) == "POL-705"
    assert asked(resident, "go", STUBBORN)["facts"]["calls"] == 1


@pytest.mark.attack("unwritable-bundle")
def test_row_36_a_store_of_bundles_that_cannot_be_written_is_an_error_and_the_site_goes_on(
    resident: Resident, policy: SiteFile
) -> None:
    """Row 36: also with a worker that is alive, for whose end the resident waited."""
    assert asked(resident, "go", STUBBORN)["facts"]["calls"] == 1
    store = bundle_store(Path(policy.approved))
    aside = store.rename(store.with_name("aside"))
    store.write_text("in the way")  # every file operation below it fails with an OSError
    assert asked(resident, "go", STUBBORN)["facts"]["calls"] == 2  # its code is loaded
    assert error_of(asked(resident, "go", APP + "\n# not approved\n")) == "POL-705"
    assert error_of(asked(resident, "go", STUBBORN)) == "SITE-501"
    store.unlink()
    aside.rename(store)
    assert asked(resident, "go", STUBBORN)["facts"]["calls"] == 1


@pytest.mark.parametrize("ttl", [1e300, float("inf")])
def test_the_coordinator_cannot_extend_the_deadline_without_bound(
    ttl: float, resident: Resident, policy: SiteFile
) -> None:
    message = Message(RecordDict(), metadata=Metadata(1, "7", 0, 1, "", "", 0.0, ttl, "train"))
    resident.policy = replace(policy, deadline_s=0.0)
    assert resident.deadline_s(message) == MOST_DEADLINE_S


def test_a_frame_that_trickles_is_late_as_a_whole() -> None:
    """A deadline for each part would never end."""
    near, far = socket.socketpair()

    def trickle() -> None:
        far.sendall((1000).to_bytes(8, "big"))
        for _ in range(50):
            try:
                far.sendall(b"x")
            except OSError:
                return
            time.sleep(0.1)

    with near, far:
        sender = threading.Thread(target=trickle)
        sender.start()
        with pytest.raises(TimeoutError):
            receive_frame(near, time.monotonic() + 1.0)
        near.close()
        sender.join()


def test_a_frame_in_time_arrives() -> None:
    near, far = socket.socketpair()
    with near, far:
        send_frame(far, b"content")
        assert receive_frame(near, time.monotonic() + 60) == b"content"


@pytest.mark.attack("hanging-resident")
def test_row_29_a_resident_that_hangs_is_replaced(
    policy: SiteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 29: a stopped resident process; the SuperNode is a process that answers with 501."""
    home = prepare_home(policy)
    site_file = tmp_path / "site.yaml"
    write_site_file(site_file, policy)
    start = (
        "import sys; import fedsgcg.deploy.site.resident as r; r.WAITING_S = 5.0;"
        "r.UNREACHABLE_S = 300.0; sys.exit(r.main())"
    )

    def node_command(_policy: SiteFile, _file: Path, port: int, _secret: Path) -> list[str]:
        return [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]

    def resident_command(file: Path, port: int, secret: Path, _cold: bool) -> list[str]:
        arguments = [str(file), f"127.0.0.1:{port}", str(secret), "cold"]
        return [sys.executable, "-P", "-c", start, *arguments]

    monkeypatch.setattr(supervisor, "supernode_command", node_command)
    monkeypatch.setattr(supervisor, "resident_command", resident_command)
    monkeypatch.setattr(supervisor, "LAST_REPLY_S", 0.0)
    monkeypatch.setattr(supervisor, "STOP_S", 1.0)
    reasons: list[str] = []
    join = Join(policy, site_file, lambda line: None, cold=True)
    life = threading.Thread(target=lambda: reasons.append(join._live(home)))
    life.start()
    state = home / "resident.json"
    end = time.monotonic() + 120
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.1)
    pid = int(supervisor.read_facts(state)["pid"])
    with suppress(ProcessLookupError):  # on a slow machine it may have been replaced already
        os.kill(pid, signal.SIGSTOP)
    life.join(120)
    join.stop()
    assert [reason.partition(" (")[0] for reason in reasons] == ["the resident does not respond"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_announced_silence_is_allowed_and_no_more(policy: SiteFile) -> None:
    home = prepare_home(policy)
    assert silent_s(home) == 0  # not started
    expect_pulse(home, 1000.0)
    assert silent_s(home) == 0
    expect_pulse(home, -50.0)
    assert 50 <= silent_s(home) < 60
    assert (home / ALIVE).stat().st_size == 0


def test_a_full_disk_below_the_logs_does_not_stop_a_process_that_prints(
    policy: SiteFile, tmp_path: Path
) -> None:
    """Row 36: the reader of its output used to end, and the process waited to print for ever."""
    home = prepare_home(policy)
    (home / "logs").rmdir()
    (home / "logs").write_text("in the way")
    join = Join(policy, tmp_path / "site.yaml", lambda line: None)
    program = "for _ in range(5000): print('x' * 99)"
    child = join._start([sys.executable, "-c", program], home, "resident")
    assert child.wait(60) == 0
