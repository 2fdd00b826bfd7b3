"""Receipts: the coordinator countersigns the ledger line of each reply that it has received.

A reply carries the number and the hash of the ledger line that records it (`Head`). The coordinator
signs both, with the digest of what arrived, writes the receipt into its own book and sends it with
its next message to the site, which keeps it. From then on neither side can shorten or rewrite its
book without contradicting the other's.

The signature is that of the coordinator's server key (ECDSA, SHA-384). The receipt contains the
server's certificate, which the site verifies with the authority that it already trusts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from flwr.app import ConfigRecord, RecordDict

from fedsgcg.common.errors import fail
from fedsgcg.common.files.signing import Signature, Signer

HEAD: Final = "ledger"
RECEIPT: Final = "receipt"
"""Names of the records of a head and of a receipt, which are not part of a payload's digest."""

LONGEST_TEXT: Final = 64
LONGEST_RECEIPT: Final = 16_384
"""Most characters of a receipt, most of which are those of the certificate."""


@dataclass(frozen=True)
class Head:
    """The last line of a site's ledger.

    Attributes:
        seq: Number of the line, from 0.
        hash: Its hash.
    """

    seq: int
    hash: str

    def attach(self, records: RecordDict) -> None:
        """Add the head to a reply."""
        records[HEAD] = ConfigRecord({"seq": self.seq, "hash": self.hash})

    @classmethod
    def of(cls, records: RecordDict) -> Head | None:
        """Read the head of a reply; None if there is none or it is not one."""
        record = records.config_records.get(HEAD)
        if record is None:
            return None
        seq, text = record.get("seq"), record.get("hash")
        hexadecimal = (
            isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")
        )
        if not hexadecimal or not isinstance(seq, int) or not 0 <= seq < 2**53:
            return None
        return cls(seq, str(text))


@dataclass(frozen=True)
class Receipt:
    """The coordinator's confirmation of one reply.

    Attributes:
        site: Name that the site stated.
        seq: Number of the ledger line that records the reply.
        line: Hash of that line.
        payload: Digest of the reply that arrived (`payload_digest`).
        time: When it arrived (UTC, ISO 8601).
        previous: Hash of the line before in the coordinator's book of this site.
        certificate: The server's certificate (DER, base64).
        signature: Signature over all other fields (DER, base64).
    """

    site: str
    seq: int
    line: str
    payload: str
    time: str
    previous: str
    certificate: str = ""
    signature: str = ""

    @property
    def content(self) -> bytes:
        """The signed bytes."""
        fields = {name: value for name, value in asdict(self).items() if name != "signature"}
        return json.dumps(fields, sort_keys=True).encode()

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Receipt:
        """Read a receipt from a book's line or a message; raises KeyError or ValueError."""
        texts = {
            name: str(tree[name])
            for name in ("site", "line", "payload", "time", "previous", "certificate", "signature")
        }
        return cls(seq=int(tree["seq"]), **texts)

    def encode(self) -> ConfigRecord:
        """Encode the receipt for a message."""
        return ConfigRecord({"receipt": json.dumps(asdict(self))})

    @classmethod
    def of(cls, records: RecordDict) -> Receipt | None:
        """Read the receipt in a message, None if there is none; raises PAY-106 for another text."""
        record = records.config_records.get(RECEIPT)
        if record is None:
            return None
        try:
            return cls.from_tree(json.loads(str(record["receipt"])))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise fail("PAY-106", found="an unreadable receipt", expected="a receipt") from error

    def verify(self, authority: Path) -> bool:
        """Return whether the coordinator has signed this receipt.

        Args:
            authority: Certificate of the authority that signs the server's certificate (PEM).

        Raises:
            FedsgcgError: DEP-603 when the authority's certificate cannot be read.
        """
        return Signature(self.certificate, self.signature).fits(self.content, authority)

    @classmethod
    def signed(cls, signer: Signer, **fields: Any) -> Receipt:
        """Return the receipt of these fields with the coordinator's signature."""
        unsigned = cls(**fields, certificate=signer.certificate)
        return replace(unsigned, signature=signer.sign(unsigned.content).signature)


def payload_digest(records: RecordDict) -> str:
    """Return the SHA-256 over every record of a reply but its head, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(set(records) - {HEAD, RECEIPT}):
        record = records[name]
        for key in sorted(record):
            value = record[key]
            data = getattr(value, "data", None)  # the bytes of an array
            if data is None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
            sha.update(f"{name}/{key}/{len(data)}\n".encode())
            sha.update(data)
    return sha.hexdigest()
