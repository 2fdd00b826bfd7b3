"""Sizes that the parts of a message may have.

They follow from the reader's own plan (`common.settings.message_sizes`) and from constants, never
from the sender, and are checked before a part is decoded (PAY-105). Decoding a whole message then
allocates at most its received bytes, once, plus `MOST_EXTRA_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedsgcg.common.names import MAX_CLASSES
from fedsgcg.common.wire.amplitudes import MAX_BYTES as MAX_AMPLITUDE_BYTES
from fedsgcg.common.wire.norm_moments import MAX_BYTES as MAX_MOMENT_BYTES
from fedsgcg.common.wire.payload import MAX_FEATURES, cases_bytes, statistics_bytes

MOST_EXTRA_BYTES: Final = 64 * 2**20
"""Objects made from the largest allowed texts and tables, besides the decoded arrays."""

MAX_WEIGHTS: Final = 2**28
"""Most values of a model, 1 GiB; the U-Net has 2 million."""

MAX_METRICS: Final = 256
TEXT_BYTES: Final = {
    "identity": 4096,
    "site": 512,
    "error": 64,
    "layout": 2**20,
    "options": 2**20,
    "details": 2**21,
}
"""Bytes of each text. `details` holds about 80 bytes per case (aliases, problems, hashes)."""


@dataclass(frozen=True)
class Sizes:
    """What the reader of a message expects of its sizes; the default accepts every plan.

    Attributes:
        statistics: (K, A) of class statistics; None for any up to the constants.
        structures: Number of structures of the plan.
        amplitudes: Bytes of shared amplitudes.
        weights: Number of floating-point values of the model.
        codec: How a reply's weights are coded (`common.wire.codecs`).
        shift: Most classes of all sites in what a request states of their differences; 0 = none.
    """

    statistics: tuple[int, int] | None = None
    structures: int = MAX_CLASSES
    amplitudes: int = MAX_AMPLITUDE_BYTES
    weights: int = MAX_WEIGHTS
    codec: str = "none"
    shift: int = MAX_CLASSES

    def bytes_of(self, part: str) -> int:
        """Bytes that a field of the message may have; -1 for a field that does not exist."""
        limits = TEXT_BYTES | {
            "statistics": statistics_bytes(*(self.statistics or (MAX_CLASSES, MAX_FEATURES))),
            "cases": cases_bytes(self.structures),
            "moments": MAX_MOMENT_BYTES,
            "amplitudes": self.amplitudes,
        }
        if self.shift:
            features = self.statistics[1] if self.statistics else MAX_FEATURES
            limits["shift"] = statistics_bytes(self.shift, features)
        return limits.get(part, -1)
