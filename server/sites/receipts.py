"""Receipts for the sites' replies, and the coordinator's own book of them.

Every reply that carries the head of its site's ledger is countersigned (`common.wire.receipts`), in
the order of arrival and before it is decoded. The book of each node, `receipts/NODE.jsonl` in the
coordinator's kit, is a hash chain and outlives the runs; its last receipt travels with the next
message to that node.

The grid is wrapped, so that no reply can pass without a receipt. Outside of a kit (a simulation)
there is no key, and the grid is used as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsgcg.common.errors import fail
from fedsgcg.common.files.chain import START, BrokenChainError, open_book, read_book
from fedsgcg.common.files.signing import KIT, Signer
from fedsgcg.common.wire.receipts import LONGEST_TEXT, RECEIPT, Head, Receipt, payload_digest

FOLDER = "receipts"


def with_receipts(grid: Grid, variables: Mapping[str, str] = os.environ) -> Grid:
    """Return a grid that countersigns replies if this process belongs to a coordinator's kit.

    Raises:
        FedsgcgError: SRV-402 for a book that was changed, DEP-603 for an unusable server key.
    """
    signer = Signer.of_process(variables)
    if signer is None:
        return grid
    folder = Path(variables[KIT]) / FOLDER
    return cast(Grid, CountersigningGrid(grid, Receipts(folder, signer)))


class Receipts:
    """The coordinator's books, one for each node.

    Args:
        folder: Folder of the books.
        signer: Signs the receipts.

    Raises:
        FedsgcgError: SRV-402 for a book that was changed.
    """

    def __init__(self, folder: Path, signer: Signer) -> None:
        self._folder, self._signer = folder, signer
        self._last: dict[int, Receipt] = {}
        for path in sorted(folder.glob("*.jsonl")):
            if entries := _checked(path):
                self._last[int(path.stem)] = Receipt.from_tree(entries[-1]["receipt"])

    def last(self, node: int) -> Receipt | None:
        """Return the newest receipt of a node."""
        return self._last.get(node)

    def countersign(self, node: int, records: RecordDict) -> Receipt | None:
        """Write the receipt of a reply into the node's book; None for a reply without a head.

        Raises:
            FedsgcgError: SRV-402 for a book that was changed, SRV-401 when it cannot be written.
        """
        head = Head.of(records)
        if head is None:
            return None
        path = self._folder / f"{node}.jsonl"
        try:
            with open_book(path, "Put the coordinator's kit on a local disk.") as book:
                receipt = Receipt.signed(
                    self._signer,
                    site=_stated_name(records),
                    seq=head.seq,
                    line=head.hash,
                    payload=payload_digest(records),
                    time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                    previous=str(book.last[-1]["hash"]) if book.last else START,
                )
                book.append({"receipt": asdict(receipt)})
        except BrokenChainError as error:
            raise _changed(path, error) from error
        except OSError as error:
            raise fail("SRV-401", where=str(path), found=str(error)) from error
        self._last[node] = receipt
        return receipt


class CountersigningGrid:
    """A grid that countersigns each reply and sends each node its newest receipt.

    Args:
        grid: Flower's grid.
        receipts: The books.
    """

    def __init__(self, grid: Grid, receipts: Receipts) -> None:
        self._grid, self._receipts = grid, receipts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        """Send messages, each with its node's newest receipt."""
        return self._grid.push_messages([self._with_receipt(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Receive replies and countersign them."""
        messages = list(self._grid.pull_messages(message_ids))
        for message in messages:
            if not message.has_error():
                self._receipts.countersign(message.metadata.src_node_id, message.content)
        return messages

    def _with_receipt(self, message: Message) -> Message:
        facts = message.metadata
        receipt = self._receipts.last(facts.dst_node_id)
        if receipt is None:
            return message
        # One content is shared by the messages to all sites, so the record goes into a copy.
        content = RecordDict({**message.content, RECEIPT: receipt.encode()})
        return Message(content, facts.dst_node_id, facts.message_type, ttl=facts.ttl)


def _stated_name(records: RecordDict) -> str:
    """Return the site's name as it states it: short and printable; the book is the node's."""
    record = records.config_records.get("message")
    text = str(record.get("site", ""))[:LONGEST_TEXT] if record is not None else ""
    return "".join(char for char in text if char.isascii() and char.isprintable())


def _checked(path: Path) -> list[dict[str, Any]]:
    try:
        return read_book(path)
    except BrokenChainError as error:
        raise _changed(path, error) from error
    except OSError as error:
        raise fail("SRV-402", where=str(path), found=str(error)) from error


def _changed(path: Path, error: BrokenChainError) -> Exception:
    action = "restore it from a backup; the hospitals keep the receipts too"
    return fail("SRV-402", where=str(path), found=str(error), action=action)
