"""Random streams: one per (seed, round, site, purpose), so that no draw depends on who came first.

A stream is named, never shared: two sites, two rounds or two purposes can never influence each other, whatever the
number of actors or the order of arrival. Names are hashed with BLAKE2b, whose digest is the same on every machine
(Python's own `hash` is salted per process).
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_seed(seed: int, *names: str | int) -> int:
    """Derive a 64-bit seed from the study's seed and the names of a stream.

    Args:
        seed: The study's seed.
        names: What the stream is for, e.g. `(round_number, site, "batches")`.

    Returns:
        A non-negative integer below 2**63 (torch refuses larger ones).
    """
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the NumPy generator of a named stream (see `stream_seed`)."""
    return np.random.default_rng(stream_seed(seed, *names))
