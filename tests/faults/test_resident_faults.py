"""The resident and its worker: whatever a training does, the coordinator gets an answer."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.approval import approve, read_bundle, refused_bundles
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.wire.messages import decode_reply
from fedsgcg.common.wire.payload import Identity
from fedsgcg.deploy.site.resident import Resident
from tests.conftest import REPOSITORY
from tests.unit.clients.test_approval import fab
from tests.unit.clients.test_policy import policy_for

IDENTITY = Identity("run", "South", 3, "f" * 64)
APP = """
import os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
calls = []

@app.train()
def train(message, context):
    calls.append(1)
    word = message.content["message"]["word"]
    if word == "sleep":
        time.sleep(60)
    if word == "die":
        os._exit(7)
    if word == "raise":
        raise RuntimeError("cannot read MUSTERMANN")
    context.state["seen"] = ConfigRecord({"calls": len(calls)})
    facts = {"pid": os.getpid(), "calls": len(calls), "file": __file__}
    return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=message)
"""


def files(app: str) -> dict[str, str]:
    """The files of a bundle with this app."""
    start = (REPOSITORY / "fedsgcg" / "__init__.py").read_text()
    return {"fedsgcg/__init__.py": start, "clients/app.py": app, "clients/__init__.py": ""}


@pytest.fixture
def policy(tmp_path: Path) -> SiteFile:
    made = policy_for(tmp_path, tmp_path, deadline_s=30.0)
    approve(
        read_bundle(fab(files(APP))),
        Path(made.approved),
        "test",
    )
    return made


@pytest.fixture
def resident(policy):
    made = Resident(policy, "127.0.0.1:1", b"secret")
    yield made
    made._end_worker()


def asked(resident: Resident, word: str, app: str = APP) -> RecordDict:
    """What the resident answers to a message with a word in it."""
    content = RecordDict({"message": ConfigRecord({"identity": IDENTITY.encode(), "word": word})})
    metadata = Metadata(1, "7", 0, 1, "", "", time.time(), 600.0, "train")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    bundle = fab(files(app))
    reply, _ = resident._answer(Message(content, metadata=metadata), context, bundle, 1)
    assert reply.metadata.reply_to_message_id == "7"
    return reply.content


def error_of(content: RecordDict) -> str:
    reply = decode_reply(content)
    assert reply.identity == IDENTITY
    assert reply.site == "North"
    return reply.error


def test_one_warm_process_answers_message_after_message(resident):
    first, second = asked(resident, "go")["facts"], asked(resident, "go")["facts"]
    assert first["pid"] == second["pid"] != os.getpid()
    assert (first["calls"], second["calls"]) == (1, 2)
    assert "bundles" in first["file"], (
        "the code must come from the approved bundle, not from the installed package"
    )


def test_a_bundle_whose_app_is_elsewhere_does_not_run(resident, policy):
    """Without its own `fedsgcg` a bundle would run the installed code under its approval."""
    alone = {name: text for name, text in files(APP).items() if name.startswith("clients/")}
    approve(read_bundle(fab(alone)), Path(policy.approved), "test")
    content = RecordDict({"message": ConfigRecord({"identity": IDENTITY.encode(), "word": "go"})})
    metadata = Metadata(1, "7", 0, 1, "", "", time.time(), 600.0, "train")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    reply, _ = resident._answer(Message(content, metadata=metadata), context, fab(alone), 1)
    assert error_of(reply.content) == "SITE-504"


def test_cold_every_message_has_a_process_of_its_own(resident):
    resident.cold = True
    first, second = asked(resident, "go")["facts"], asked(resident, "go")["facts"]
    assert first["pid"] != second["pid"]
    assert (first["calls"], second["calls"]) == (1, 1)


def test_another_approved_bundle_gets_another_process(resident, policy):
    first = asked(resident, "go")["facts"]
    other = APP + "\n# a new version\n"
    approve(
        read_bundle(fab(files(other))),
        Path(policy.approved),
        "test",
    )
    second = asked(resident, "go", other)["facts"]
    assert first["pid"] != second["pid"]
    assert first["file"] != second["file"]


@pytest.mark.row(57)
def test_code_that_is_not_approved_is_not_even_imported(resident, policy, tmp_path):
    proof = tmp_path / "proof"
    evil = f"open({str(proof)!r}, 'w')\n" + APP
    assert error_of(asked(resident, "go", evil)) == "POL-705"
    assert not proof.exists()
    (kept,) = refused_bundles(Path(policy.approved))
    assert read_bundle(kept.read_bytes()).code["clients/app.py"].decode() == evil
    assert [path.name for path in kept.parent.iterdir() if path.is_dir()] == [], (
        "refused code must not be unpacked"
    )
    (line,) = ledger.entries(Path(policy.home) / "ledger.jsonl")
    assert "POL-705" in line["note"]


@pytest.mark.row(29)
def test_a_training_past_the_sites_deadline_is_ended_and_answered(resident, policy):
    pid = asked(resident, "go")["facts"]["pid"]
    resident.policy = replace(policy, deadline_s=1.0)
    started = time.monotonic()
    assert error_of(asked(resident, "sleep")) == "SITE-503"
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    resident.policy = policy
    assert asked(resident, "go")["facts"]["calls"] == 1, "the next message gets a fresh process"


def test_a_training_that_dies_is_answered_at_once(resident):
    assert error_of(asked(resident, "die")) == "SITE-504"
    assert asked(resident, "go")["facts"]["calls"] == 1


@pytest.mark.row(28)
def test_a_training_that_is_killed_is_answered_at_once(resident):
    pid = asked(resident, "go")["facts"]["pid"]
    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    assert error_of(asked(resident, "sleep")) == "SITE-504"


def test_a_worker_that_died_between_messages_is_replaced_unseen(resident):
    pid = asked(resident, "go")["facts"]["pid"]
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert asked(resident, "go")["facts"]["pid"] != pid


def test_an_error_of_the_app_leaves_as_a_code(resident, policy):
    content = asked(resident, "raise")
    assert error_of(content) in ("SITE-500", "SITE-504")
    assert "MUSTERMANN" not in str(content)


@pytest.mark.row(32)
def test_a_site_that_is_stopped_ends_its_training_and_reports_it(resident):
    asked(resident, "go")
    threading.Timer(1.0, resident.stop).start()
    assert error_of(asked(resident, "sleep")) == "SITE-505"
