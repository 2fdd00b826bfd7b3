"""Random streams, one for each seed, round, site and purpose.

Streams are independent: no draw depends on the number of workers or on the order in which sites
answer. Names are hashed with BLAKE2b, which gives the same digest on every machine (Python's `hash`
is salted per process).
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_seed(seed: int, *names: str | int) -> int:
    """Derive the seed of a stream from the study's seed and the stream's names.

    Args:
        seed: The study's seed.
        names: What the stream is for, e.g. `(round_number, site, "batches")`.

    Returns:
        A non-negative integer below 2**63, the range that torch accepts.
    """
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the NumPy generator of a named stream (see `stream_seed`)."""
    return np.random.default_rng(stream_seed(seed, *names))
