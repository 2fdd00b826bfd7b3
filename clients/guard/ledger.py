"""The ledger of what left this hospital: one JSON line per message, in a hash chain.

Each line is on the disk before its message leaves. Three things protect the book as a whole:

- the chain (`common.files.chain`): no line can be changed, removed or swapped;
- the head, `ledger.head`: number and hash of the last line, signed with the site's key, so that
  lines cut off at the end and a book written anew are noticed by whoever lacks that key;
- the coordinator's receipts, `receipts.jsonl` (`common.wire.receipts`): whoever has the site's key,
  or removes both files, still contradicts what the coordinator countersigned.

Nothing is appended to, and so nothing leaves with, a ledger that fails one of them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.files.chain import BrokenChainError, Entry, open_book, read_book
from fedsgcg.common.wire.receipts import Head, Receipt

LOCAL_DISK = "Set home in site.yaml to a folder on a local disk."
RECEIPTS = "receipts.jsonl"
REFUSED = "receipt-refused.json"
"""The receipt that contradicted the ledger; `fedsgcg-site ledger --continue` refers to it."""

GAP = "gap"
"""Kind of a line in which the staff explains why receipts contradict the ledger."""

EXPLAINED = re.compile(r"\[receipts until (\S+)\]$")


def append(
    path: Path,
    *,
    round_number: int,
    kind: str,
    parts: Mapping[str, int],
    withheld: Sequence[str],
    sha256: str,
    note: str = "",
    key: Path | None = None,
) -> Head:
    """Verify the ledger, append one line and wait until it is on the disk.

    The whole chain is verified once in a process, the head and the last lines every time.

    Args:
        path: The ledger; created with its folder if missing.
        round_number: Round of the message.
        kind: Type of the message that is answered, e.g. `train`.
        parts: Bytes of each part of the reply.
        withheld: Names of the classes that the privacy floors withheld.
        sha256: Digest of the reply.
        note: Remark for the site's staff, e.g. why a request was refused.
        key: The site's private key, which signs the head; None in a simulation.

    Returns:
        Number and hash of the line.

    Raises:
        FedsgcgError: SITE-501 when the line cannot be written (disk full, no permission) or the
            ledger was changed; CFG-008 when the file system does not support locks.
    """
    try:
        with open_book(path, LOCAL_DISK) as book:
            if key is not None and (problem := _head_problem(path, book.count, book.last, key)):
                raise _changed(path, problem)
            entry = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "round": round_number,
                "kind": kind,
                "parts": dict(parts),
                "withheld": list(withheld),
                "sha256": sha256,
            } | ({"note": note} if note else {})
            line = book.append(entry)
            head = Head(int(line["seq"]), str(line["hash"]))
            if key is not None:
                _write_head(path, head, key)
            return head
    except BrokenChainError as error:
        raise _changed(path, str(error)) from error
    except (OSError, ValueError) as error:
        raise fail(
            "SITE-501",
            where=str(path),
            found=str(error),
            expected="a writable ledger",
            action="free disk space or correct the permissions; the site answers again as soon as "
            "it can write",
        ) from error


def verify(path: Path) -> int:
    """Verify the chain and return the number of lines.

    Raises:
        FedsgcgError: SITE-501 with the first line that does not fit.
    """
    return len(entries(path))


def entries(path: Path) -> list[Entry]:
    """Return every line, after verifying the chain.

    Raises:
        FedsgcgError: SITE-501 with the first line that does not fit.
    """
    try:
        return read_book(path)
    except BrokenChainError as error:
        raise _changed(path, str(error)) from error


@dataclass(frozen=True)
class Standing:
    """The result of comparing a ledger with its head and with the coordinator's receipts.

    Attributes:
        lines: Number of lines.
        problems: What contradicts the ledger; empty when nothing does.
        receipts: Number of the coordinator's receipts.
        unconfirmed: Number of the last lines that no receipt covers.
        signed: Whether there is a signed head.
    """

    lines: int
    problems: tuple[str, ...]
    receipts: int
    unconfirmed: int
    signed: bool


def examine(path: Path, key: Path, authority: Path, book: Path | None = None) -> Standing:
    """Compare a ledger with its signed head and with the coordinator's receipts.

    Args:
        path: The ledger.
        key: The site's private key.
        authority: Certificate of the authority.
        book: The coordinator's own book of this site, if it sent a copy.

    Raises:
        FedsgcgError: SITE-501 when the chain itself is broken.
    """
    lines = entries(path) if path.exists() else []
    problems = []
    if head := _head_problem(path, len(lines), lines[-2:], key):
        problems.append(head)
    kept = read_receipts(path.with_name(RECEIPTS))
    for receipt in [*kept, *(read_receipts(book) if book else [])]:
        if not receipt.verify(authority):
            problems.append(f"the receipt for line {receipt.seq} is not signed by the coordinator")
        elif found := contradiction(lines, receipt):
            problems.append(found)
    confirmed = max((receipt.seq for receipt in kept), default=-1)
    unconfirmed = max(0, len(lines) - 1 - confirmed)
    signed = path.with_suffix(".head").is_file()
    distinct = tuple(dict.fromkeys(problems))
    return Standing(len(lines), distinct, len(kept), unconfirmed, signed)


def contradiction(lines: Sequence[Entry], receipt: Receipt) -> str:
    """Return how a receipt contradicts a ledger, "" if it does not or the staff explained it."""
    if receipt.time <= max(map(_explained_until, lines), default=""):
        return ""
    if receipt.seq >= len(lines):
        return (
            f"the coordinator confirmed line {receipt.seq} on {receipt.time}, but the ledger has "
            f"{len(lines)} lines: its end was cut off"
        )
    line = lines[receipt.seq]
    if line["hash"] != receipt.line:
        return f"line {receipt.seq} is not the one that the coordinator confirmed: it was rewritten"
    if line["sha256"] != receipt.payload:
        return f"line {receipt.seq} records another message than the one that the coordinator has"
    return ""


def read_receipts(path: Path) -> list[Receipt]:
    """Return the receipts of this site's book, or of a copy of the coordinator's.

    Raises:
        FedsgcgError: SITE-501 for a line that is not a receipt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        trees = [json.loads(line) for line in lines]
        return [Receipt.from_tree(tree.get("receipt", tree)) for tree in trees]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _changed(path, f"a line that is no receipt ({type(error).__name__})") from error


def take_receipt(receipt: Receipt, path: Path, authority: Path) -> None:
    """Compare a receipt with the ledger, and keep it.

    Raises:
        FedsgcgError: PAY-106 for a receipt that the coordinator did not sign; SITE-520 when it
            contradicts the ledger; SITE-501 when it cannot be kept.
    """
    try:
        if not receipt.verify(authority):
            raise fail("PAY-106", found="a receipt with a wrong signature")
        lines = entries(path) if path.exists() else []
        if found := contradiction(lines, receipt):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(REFUSED).write_text(json.dumps(_tree(receipt)), encoding="utf-8")
            raise fail("SITE-520", where=str(path), found=found, action=CONTINUE)
        with path.with_name(RECEIPTS).open("a", encoding="utf-8") as file:
            if receipt.signature not in {kept.signature for kept in _last(path)}:
                file.write(json.dumps(_tree(receipt)) + "\n")
    except OSError as error:
        raise fail("SITE-501", where=str(path), found=str(error)) from error


CONTINUE = (
    "find out who changed the ledger; if you know why (e.g. a backup was restored), record it: "
    'fedsgcg-site ledger KIT --continue "REASON"'
)


def record_gap(path: Path, reason: str, key: Path, authority: Path) -> Head:
    """Record in the ledger why its head or a receipt contradicts it, and go on.

    Raises:
        FedsgcgError: SITE-501 when nothing contradicts the ledger, its chain is broken, or the line
            cannot be written.
    """
    refused = path.with_name(REFUSED)
    receipts = [*read_receipts(path.with_name(RECEIPTS)), *read_receipts(refused)]
    times = [receipt.time for receipt in receipts if receipt.verify(authority)]
    if not refused.is_file() and not examine(path, key, authority).problems:
        raise fail("SITE-501", where=str(path), found="a ledger that nothing contradicts")
    path.with_suffix(".head").unlink(missing_ok=True)
    head = append(
        path,
        round_number=0,
        kind=GAP,
        parts={},
        withheld=[],
        sha256="",
        note=f"{reason} [receipts until {max(times, default='none')}]",
        key=key,
    )
    refused.unlink(missing_ok=True)
    return head


def _explained_until(line: Entry) -> str:
    """Return the time until which a line explains receipts that contradict the ledger, or ""."""
    found = EXPLAINED.search(str(line.get("note", ""))) if line.get("kind") == GAP else None
    return found.group(1).replace("none", "") if found else ""


def _last(path: Path) -> list[Receipt]:
    return read_receipts(path.with_name(RECEIPTS))[-1:]


def _tree(receipt: Receipt) -> dict[str, Any]:
    return {**json.loads(receipt.content), "signature": receipt.signature}


def _head_problem(path: Path, count: int, last: Sequence[Entry], key: Path) -> str:
    """Return how the signed head contradicts the ledger, "" if it does not or there is none.

    Args:
        path: The ledger.
        count: Number of its lines.
        last: Its last two lines.
        key: The site's private key.
    """
    # One line more than the head says is the result of a crash between the two writes.
    file = path.with_suffix(".head")
    if not file.is_file():
        return ""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        seq, text = int(tree["seq"]), str(tree["hash"])
        signature = base64.b64decode(str(tree["signature"]))
        _private(key).public_key().verify(
            signature, _head_bytes(seq, text), ec.ECDSA(hashes.SHA384())
        )
    except OSError as error:
        return f"{file.name} cannot be verified: {error}"
    except (InvalidSignature, ValueError, KeyError, TypeError):
        return f"{file.name} is not signed with this site's key"
    if seq >= count:
        return f"the ledger has {count} lines, {file.name} says {seq + 1}: its end was cut off"
    if not any(line["seq"] == seq and line["hash"] == text for line in last):
        return f"the ledger is not the one of {file.name}: it was rewritten"
    return ""


def _write_head(path: Path, head: Head, key: Path) -> None:
    signature = _private(key).sign(_head_bytes(head.seq, head.hash), ec.ECDSA(hashes.SHA384()))
    tree = {
        "seq": head.seq,
        "hash": head.hash,
        "signature": base64.b64encode(signature).decode(),
    }
    write_file(path.with_suffix(".head"), json.dumps(tree).encode())


def _head_bytes(seq: int, text: str) -> bytes:
    return f"fedsgcg ledger head {seq} {text}".encode()


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_ssh_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is no elliptic-curve key")
    return key


def _changed(path: Path, found: str) -> FedsgcgError:
    return fail("SITE-501", where=str(path), found=found, expected="an unchanged ledger")
