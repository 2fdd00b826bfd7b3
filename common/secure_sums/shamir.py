"""Secrets shared among sites: some of them restore a secret, fewer learn nothing about it.

A secret of 32 bytes is the value at 0 of a random polynomial of degree t - 1 over the integers
modulo the prime 2^256 + 297, and a share is its value at x = 1, 2, ... Any t shares determine the
polynomial. For t - 1 shares every secret is equally likely.

Source: Shamir 1979, "How to share a secret".
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Final

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def split(secret: bytes, threshold: int, number: int) -> list[bytes]:
    """Return the shares (33 bytes each) at x = 1 ... number.

    Raises:
        ValueError: A secret of other than 32 bytes, or a threshold outside 1 ... number.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= number:
        raise ValueError(f"found {len(secret)} bytes, {threshold} of {number} shares")
    polynomial = [int.from_bytes(secret, "big")]
    polynomial += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return [_value(polynomial, x).to_bytes(SHARE_BYTES, "big") for x in range(1, number + 1)]


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of shares by their x; at least the threshold of them must be given.

    Raises:
        ValueError: No share, an x below 1, or shares that are not of one secret.
    """
    if not shares or min(shares) < 1:
        raise ValueError(f"found shares at {sorted(shares)}, expected x of 1 or more")
    total = 0
    for x, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        total += int.from_bytes(share, "big") * numerator * pow(denominator, -1, PRIME)
    secret = total % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("found shares that are not of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def _value(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
