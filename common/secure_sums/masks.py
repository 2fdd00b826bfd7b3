"""Masks: key streams that two sites, or one site with itself, derive from a secret of one round.

Two sites agree on a secret by X25519. HKDF (SHA-256) turns it, with the identifier of the sum and
the names of both sites, into a key, and ChaCha20 turns the key into a stream of 64-bit integers. A
key is used for one stream, so that the nonce is constant. Legend: N integers of a site.
"""

from __future__ import annotations

import json
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsgcg.common.errors import fail
from fedsgcg.common.secure_sums.fixed_point import Words

KEY_BYTES: Final = 32
CHUNK: Final = 1 << 20
"""Integers of a key stream that are made at a time (8 MiB)."""


def public_bytes(private: bytes) -> bytes:
    """Return the public key (32 bytes) of an X25519 private key (32 bytes)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed_key(private: bytes, public: bytes, purpose: str, session: str, *sites: str) -> bytes:
    """Return the key (32 bytes) that two sites share for one purpose in one sum.

    Args:
        private: One's own X25519 private key.
        public: The other's public key.
        purpose: What the key is for; another purpose gives another key.
        session: Identifier of the sum.
        sites: Names of both sites, in any order.

    Raises:
        FedsgcgError: PRV-955 for a public key that gives no secret (a point of small order).
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise fail("PRV-955", found="a public key that gives no secret") from error
    return derived_key(secret, purpose, session, *sorted(sites))


def derived_key(secret: bytes, purpose: str, session: str, *names: str) -> bytes:
    """Return a key (32 bytes) that belongs to one purpose, sum and list of names."""
    info = json.dumps(["fedsgcg secure sum", purpose, *names]).encode()
    return HKDF(SHA256(), KEY_BYTES, salt=session.encode(), info=info).derive(secret)


def add_mask(words: Words, key: bytes, *, subtract: bool = False) -> None:
    """Add the key stream of a key to integers (N,) modulo 2^64, or subtract it, in place."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    zeros = bytes(8 * min(CHUNK, words.size))
    for start in range(0, words.size, CHUNK):
        part = words[start : start + CHUNK]
        mask = np.frombuffer(stream.update(zeros[: 8 * part.size]), "<u8")
        if subtract:
            np.subtract(part, mask, out=part)
        else:
            np.add(part, mask, out=part)


def sealed(key: bytes, content: bytes) -> bytes:
    """Encrypt and authenticate a message; a key is used for one message."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, None)


def unsealed(key: bytes, content: bytes, sender: str) -> bytes:
    """Return the content of `sealed`; raises PRV-956 if the sender does not have the key."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), content, None)
    except (InvalidTag, ValueError) as error:
        raise fail(
            "PRV-956",
            where=sender,
            found="a share that its sender has not encrypted for this site in this sum",
        ) from error
