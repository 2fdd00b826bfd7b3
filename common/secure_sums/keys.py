"""Identities of the sites, which sign the keys of every sum.

A hospital's identity is the key of its kit (ECDSA, P-384), with which it also signs its requests to
the server. In a simulation, in which one person has all images, a site's key follows from its name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsgcg.common.errors import fail
from fedsgcg.common.secure_sums.masks import KEY_BYTES

ALGORITHM: Final = ec.ECDSA(hashes.SHA384())
LONGEST: Final = 512
"""Most bytes of a signature or of an identity's public key."""


@dataclass(frozen=True)
class SiteKey:
    """A site's identity.

    Attributes:
        key: Its private key.
    """

    key: ec.EllipticCurvePrivateKey

    @classmethod
    def of_file(cls, path: Path) -> SiteKey:
        """Read the key of a kit; raises DEP-603 for a file that is none."""
        try:
            key = serialization.load_ssh_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise fail("DEP-603", where=str(path), found=str(error)) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise fail("DEP-603", where=str(path), found="a key of another type")
        return cls(key)

    @classmethod
    def simulated(cls, site: str) -> SiteKey:
        """Return the key of a simulated site, which anybody can derive from its name."""
        number = int.from_bytes(hashlib.sha384(f"fedsgcg simulated site {site}".encode()).digest())
        return cls(ec.derive_private_key(number >> 8 | 1, ec.SECP384R1()))

    @property
    def public(self) -> bytes:
        """The public key (DER)."""
        return self.key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, content: bytes) -> bytes:
        """Return a signature of some bytes (DER)."""
        return self.key.sign(content, ALGORITHM)


def is_signed(content: bytes, signature: bytes, public: bytes) -> bool:
    """Whether the owner of a public key (DER) signed some bytes."""
    try:
        key = serialization.load_der_public_key(public)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, content, ALGORITHM)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def key_fingerprint(public: bytes) -> str:
    """Return 128 bits of a public key's SHA-256 in pairs of digits, as `fedsgcg-site` shows it.

    It is that of the OpenSSH line of the key, which is what the staff has in `site.pub`.
    """
    key = serialization.load_der_public_key(public)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digits = hashlib.sha256(base64.b64decode(line.split()[1])).hexdigest()[:32].upper()
    return ":".join(digits[i : i + 2] for i in range(0, 32, 2))


@dataclass(frozen=True)
class SumKeys:
    """What a site announces for one sum.

    Attributes:
        cipher: X25519 public key for the encryption of shares.
        mask: X25519 public key for the masks.
        identity: Public key of the site's identity (DER).
        signature: Its signature of `content`.
    """

    cipher: bytes
    mask: bytes
    identity: bytes
    signature: bytes

    @staticmethod
    def content(session: str, site: str, cipher: bytes, mask: bytes) -> bytes:
        """Return the signed bytes: a key belongs to one site in one sum."""
        fields = ["fedsgcg keys of a secure sum", session, site, cipher.hex(), mask.hex()]
        return json.dumps(fields).encode()

    def check(self, session: str, site: str) -> None:
        """Raise PRV-955 for keys that this identity has not signed for this site and sum."""
        content = self.content(session, site, self.cipher, self.mask)
        if len(self.cipher) != KEY_BYTES or len(self.mask) != KEY_BYTES:
            raise fail("PRV-955", where=site, found="a key of another length", expected="32 bytes")
        if not is_signed(content, self.signature, self.identity):
            raise fail(
                "PRV-955",
                where=site,
                found="keys without the site's signature for this sum",
                expected="fresh keys, signed for this sum",
            )

    def is_of(self, registered: bytes) -> bool:
        """Whether the identity is a registered public key (PEM, as Flower's server keeps it)."""
        try:
            known = serialization.load_pem_public_key(registered)
        except (ValueError, UnsupportedAlgorithm):
            return False
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return known.public_bytes(serialization.Encoding.DER, form) == self.identity

    def to_tree(self) -> dict[str, str]:
        """Return the keys as text."""
        return {name: text_of(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_tree(cls, tree: Any) -> SumKeys:
        """Read `to_tree`; raises PAY-106 for anything else."""
        if not isinstance(tree, Mapping):
            raise fail("PAY-106", found="no keys of a sum")
        return cls(*(bytes_of(tree.get(name)) for name in cls.__dataclass_fields__))


def text_of(content: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(content).decode()


def bytes_of(text: Any) -> bytes:
    """Return the bytes of `text_of`, at most `LONGEST`; raises PAY-106 for anything else."""
    try:
        content = base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except (binascii.Error, ValueError) as error:
        raise fail(
            "PAY-106", found="text that is not base64", expected="bytes as base64"
        ) from error
    if len(content) > LONGEST:
        raise fail("PAY-105", found=f"{len(content)} bytes", expected=f"at most {LONGEST}")
    return content
