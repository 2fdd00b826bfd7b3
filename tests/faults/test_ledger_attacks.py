"""Attacks on the books: a cut or rewritten ledger is noticed, at the site and elsewhere."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.site_file import SiteFile, write_site_file
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.chain import START, read_book, seal
from fedsgcg.common.files.signing import KIT, Signer
from fedsgcg.common.wire.receipts import Head, Receipt, payload_digest
from fedsgcg.deploy import certificates
from fedsgcg.deploy.cli import site as site_cli
from fedsgcg.deploy.site.supervisor import check_ledger
from fedsgcg.server.sites.receipts import CountersigningGrid, Receipts, with_receipts
from tests.unit.clients.test_policy import policy_for

NODE = 7


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages only within a task."""
    for name, value in (("_run_id", 1), ("_task_id", 1), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    """The coordinator's kit, and its authority's certificate at the site."""
    kit = tmp_path / "kit"
    kit.mkdir()
    authority = certificates.make_authority("test")
    certificates.write_authority(kit, authority)
    certificates.write_server(kit, *certificates.make_server_certificate(authority, ["localhost"]))
    shutil.copy(kit / "ca.crt", tmp_path / "ca.crt")
    return Signer.of_kit(kit)


@pytest.fixture
def policy(tmp_path: Path) -> SiteFile:
    made = policy_for(tmp_path, tmp_path)
    write_site_file(tmp_path / "site.yaml", made)
    return made


def sent(policy: SiteFile, number: int) -> RecordDict:
    """A reply that leaves the site, with the head of its ledger."""
    records = RecordDict({"message": ConfigRecord({"site": "North", "error": "", "n": number})})
    head = ledger.append(
        book(policy),
        round_number=number,
        kind="train",
        parts={"weights": 10},
        withheld=[],
        sha256=payload_digest(records),
        key=Path(policy.key),
    )
    head.attach(records)
    return records


def book(policy: SiteFile) -> Path:
    return Path(policy.home) / "ledger.jsonl"


def take(policy: SiteFile, receipt: Receipt) -> None:
    ledger.take_receipt(receipt, book(policy), Path(policy.ca))


def problems(policy: SiteFile, theirs: Path | None = None) -> str:
    standing = ledger.examine(book(policy), Path(policy.key), Path(policy.ca), theirs)
    return "; ".join(standing.problems)


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))


def rewrite(path: Path) -> None:
    """Write the whole book anew with a valid chain, one message made smaller."""
    previous, lines = START, []
    for line in path.read_text().splitlines():
        entry = {**json.loads(line), "previous": previous}
        entry["parts"] = {"weights": 1}
        entry["hash"] = previous = seal(entry)
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines))


@pytest.mark.parametrize(("attack", "word"), [(cut, "cut off"), (rewrite, "rewritten")])
@pytest.mark.attack("cut-ledger")
def test_a_changed_ledger_stops_the_next_message(policy, attack: Callable, word: str) -> None:
    """Attack: "chain intact" although the tail was cut or all of it was rewritten."""
    for number in range(4):
        sent(policy, number)
    attack(book(policy))
    assert ledger.verify(book(policy)) in (2, 4), "the chain alone is intact"
    assert word in problems(policy)
    before = book(policy).read_bytes()
    with pytest.raises(FedsgcgError, match=f"SITE-501(.|\n)*{word}"):
        sent(policy, 4)
    assert book(policy).read_bytes() == before


@pytest.mark.parametrize(("attack", "word"), [(cut, "cut off"), (rewrite, "rewritten")])
@pytest.mark.attack("cut-ledger")
def test_with_the_sites_own_key_the_coordinators_receipt_still_contradicts(
    policy, signer, tmp_path, capsys, attack: Callable, word: str
) -> None:
    """Attack: ledger, head and the site's receipts are all replaced, with the site's key."""
    receipts = Receipts(tmp_path / "kit/receipts", signer)
    for number in range(4):
        receipts.countersign(NODE, sent(policy, number))
    attack(book(policy))
    head = read_book(book(policy))[-1]
    ledger._write_head(book(policy), Head(head["seq"], head["hash"]), Path(policy.key))
    assert problems(policy) == ""
    last = receipts.last(NODE)
    with pytest.raises(FedsgcgError, match=f"SITE-520(.|\n)*{word}|not the one"):
        take(policy, last)
    theirs = tmp_path / f"kit/receipts/{NODE}.jsonl"
    assert word in problems(policy, theirs)
    arguments = ["ledger", str(tmp_path), "--receipts", str(theirs)]
    assert site_cli.main(arguments) == 1
    assert "SITE-520" in capsys.readouterr().out


def test_a_removed_ledger_is_noticed_with_the_next_message(policy, signer, tmp_path) -> None:
    receipt = Receipts(tmp_path / "r", signer).countersign(NODE, sent(policy, 0))
    shutil.rmtree(policy.home)
    with pytest.raises(FedsgcgError, match="SITE-520"):
        take(policy, receipt)


def test_both_books_agree_while_nobody_changes_them(policy, signer, tmp_path, capsys) -> None:
    receipts = Receipts(tmp_path / "r", signer)
    for number in range(5):
        receipt = receipts.countersign(NODE, sent(policy, number))
        if number < 3:
            take(policy, receipt)
            take(policy, receipt)  # the coordinator repeats it until the next reply
    assert problems(policy, tmp_path / f"r/{NODE}.jsonl") == ""
    standing = ledger.examine(book(policy), Path(policy.key), Path(policy.ca))
    assert (standing.receipts, standing.unconfirmed, standing.signed) == (3, 2, True)
    assert site_cli.main(["ledger", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 receipts of the coordinator agree with it" in said
    assert "the last 2 messages are not confirmed yet" in said


def test_a_restored_backup_is_recorded_and_the_site_goes_on(policy, signer, tmp_path, capsys):
    """An honest site whose disk was lost must be able to go on; the gap stays on record."""
    receipts = Receipts(tmp_path / "r", signer)
    for number in range(3):
        receipts.countersign(NODE, sent(policy, number))
    shutil.rmtree(policy.home)
    last = receipts.last(NODE)
    with pytest.raises(FedsgcgError, match="--continue"):
        take(policy, last)
    assert site_cli.main(["ledger", str(tmp_path), "--continue", "disk replaced"]) == 0
    take(policy, last)
    receipts.countersign(NODE, sent(policy, 3))
    take(policy, receipts.last(NODE))
    assert problems(policy, tmp_path / f"r/{NODE}.jsonl") == ""
    (gap, _) = ledger.entries(book(policy))
    assert gap["kind"] == "gap"
    assert "disk replaced" in gap["note"]
    assert last.time in gap["note"]
    assert site_cli.main(["ledger", str(tmp_path), "--continue", "again"]) == 2


def test_a_ledger_that_contradicts_its_head_is_explained_too(policy, signer, tmp_path) -> None:
    receipts = Receipts(tmp_path / "r", signer)
    for number in range(3):
        take(policy, receipts.countersign(NODE, sent(policy, number)))
    cut(book(policy))
    with pytest.raises(FedsgcgError, match="SITE-520(.|\n)*cut off"):
        check_ledger(policy)
    assert site_cli.main(["ledger", str(tmp_path), "--continue", "disk error"]) == 0
    check_ledger(policy)
    sent(policy, 3)
    assert problems(policy) == ""


def test_a_crash_between_ledger_and_head_is_no_attack(policy) -> None:
    sent(policy, 0)
    head = book(policy).with_suffix(".head")
    before = head.read_bytes()
    sent(policy, 1)
    head.write_bytes(before)
    assert problems(policy) == ""
    sent(policy, 2)


@pytest.mark.parametrize("text", ["", "{}", '{"seq": 1, "hash": "x", "signature": "AAAA"}', "[]"])
def test_a_head_that_is_not_signed_by_the_site_stops_everything(policy, text: str) -> None:
    sent(policy, 0)
    book(policy).with_suffix(".head").write_text(text)
    with pytest.raises(FedsgcgError, match="not signed"):
        sent(policy, 1)


def test_only_the_coordinators_signature_counts(policy, signer, tmp_path) -> None:
    """Attack: a receipt forged by someone who has neither the server's key nor the authority's."""
    records = sent(policy, 0)
    genuine = Receipts(tmp_path / "r", signer).countersign(NODE, records)
    stranger = certificates.make_authority("stranger")
    (tmp_path / "other").mkdir()
    certificates.write_server(
        tmp_path / "other", *certificates.make_server_certificate(stranger, ["localhost"])
    )
    forged = Receipts(tmp_path / "f", Signer.of_kit(tmp_path / "other")).countersign(NODE, records)
    changed = Receipt(**{**json.loads(genuine.content), "seq": 0, "signature": genuine.signature})
    assert changed.verify(Path(policy.ca))
    tampered = [
        forged,
        Receipt(
            **{**json.loads(genuine.content), "line": "0" * 64, "signature": genuine.signature}
        ),
        Receipt(**{**json.loads(genuine.content), "certificate": "AAAA"}),
        Receipt(**{**json.loads(genuine.content), "signature": "not base64!"}),
    ]
    for receipt in tampered:
        with pytest.raises(FedsgcgError, match="PAY-106"):
            take(policy, receipt)
    take(policy, genuine)


class Grid:
    """What the wrapped grid sees."""

    def __init__(self, replies: list[Message]) -> None:
        self.pushed: list[Message] = []
        self.replies = replies

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.pushed += messages
        return ["1"]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return self.replies

    def get_nodes(self) -> list[int]:
        return [NODE]


def reply(records: RecordDict) -> Message:
    make: Any = Message
    return make(records, metadata=Metadata(1, "1", NODE, 0, "2", "", 0.0, 60.0, "train"))


def test_every_reply_is_countersigned_and_the_receipt_travels_with_the_next_message(
    policy, signer, tmp_path
) -> None:
    grid = Grid([reply(sent(policy, 0)), reply(RecordDict())])
    wrapped = CountersigningGrid(grid, Receipts(tmp_path / "r", signer))
    request = RecordDict({"message": ConfigRecord({"identity": "x"})})
    wrapped.push_messages([Message(request, NODE, "train", ttl=60.0)])
    assert Receipt.of(grid.pushed[0].content) is None
    assert wrapped.pull_messages(["1"]) == grid.replies
    wrapped.push_messages([Message(request, NODE, "train", ttl=60.0)])
    take(policy, Receipt.of(grid.pushed[1].content))
    assert grid.pushed[1].metadata.dst_node_id == NODE
    assert list(request) == ["message"], "the content is shared by the messages to all sites"
    assert wrapped.get_nodes() == [NODE]
    assert wrapped.pull_messages(["1"])
    lines = read_book(tmp_path / f"r/{NODE}.jsonl")
    assert [line["receipt"]["previous"] for line in lines] == [START, lines[0]["hash"]]


def test_a_coordinators_book_that_was_changed_is_refused_at_the_start(policy, tmp_path, signer):
    """Attack: a coordinator denies what it received."""
    kit = tmp_path / "kit"
    grid = with_receipts(Grid([reply(sent(policy, 0))]), {KIT: str(kit)})
    grid.pull_messages(["1"])
    path = kit / f"receipts/{NODE}.jsonl"
    path.write_text(path.read_text().replace('"seq": 0', '"seq": 1', 1))
    with pytest.raises(FedsgcgError, match="SRV-402"):
        with_receipts(Grid([]), {KIT: str(kit)})
    plain = Grid([])
    assert with_receipts(plain, {}) is plain


@pytest.mark.parametrize("seq", [-1, 2**60, "0", None, 1.5])
def test_a_site_can_state_no_impossible_head(seq) -> None:
    record = {"hash": "0" * 64} | ({} if seq is None else {"seq": seq})
    assert Head.of(RecordDict({"ledger": ConfigRecord(record)})) is None
    for text in ("x", "G" * 64, "0" * 65):
        assert Head.of(RecordDict({"ledger": ConfigRecord({"seq": 0, "hash": text})})) is None
    good = ConfigRecord({"seq": 0, "hash": "0" * 64})
    assert Head.of(RecordDict({"ledger": good})) == Head(0, "0" * 64)
