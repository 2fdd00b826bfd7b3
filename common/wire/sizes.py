"""Sizes that the parts of a message may have.

They follow from the reader's own plan and from constants, never from the sender, and are checked
before a part is decoded (PAY-105). Decoding a whole message then allocates at most its received
bytes, once, plus `MOST_EXTRA_BYTES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedsgcg.common.settings.federation import SHARES
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.amplitudes import MAX_BYTES as MAX_AMPLITUDE_BYTES
from fedsgcg.common.wire.norm_moments import MAX_BYTES as MAX_MOMENT_BYTES
from fedsgcg.common.wire.payload import (
    HEAD_BYTES,
    MAX_CLASSES,
    MAX_FEATURES,
    cases_bytes,
    statistics_bytes,
)

MOST_EXTRA_BYTES: Final = 64 * 2**20
"""Objects made from the largest allowed texts and tables, besides the decoded arrays."""

MAX_WEIGHTS: Final = 2**28
"""Most values of a model, 1 GiB; the U-Net has 2 million."""

MAX_METRICS: Final = 256
MAX_SITES: Final = 100
"""Hospitals of a federation whose sites are not listed in the plan."""

TEXT_BYTES: Final = {
    "identity": 4096,
    "site": 512,
    "error": 64,
    "layout": 2**20,
    "options": 2**20,
    "details": 2**21,
}
"""Bytes of each text. `details` holds about 80 bytes per case (aliases, problems, hashes)."""

CHANNELS: Final = 3
"""Channels of a training slice: colours, or a slice and its neighbours."""


@dataclass(frozen=True)
class Sizes:
    """What the reader of a message expects of its sizes; the default accepts every plan.

    Attributes:
        statistics: (K, A) of class statistics; None for any up to the constants.
        structures: Number of structures of the plan.
        amplitudes: Bytes of shared amplitudes.
        weights: Number of floating-point values of the model.
    """

    statistics: tuple[int, int] | None = None
    structures: int = MAX_CLASSES
    amplitudes: int = MAX_AMPLITUDE_BYTES
    weights: int = MAX_WEIGHTS

    @classmethod
    def of_reply(cls, plan: Plan, weights: int = MAX_WEIGHTS) -> Sizes:
        """Sizes of a site's reply to a request with a model of so many values."""
        shape = (plan.data.num_classes, plan.network.num_features)
        return cls(shape, len(plan.data.structures), amplitude_bytes(plan, 1), weights)

    @classmethod
    def of_request(cls, plan: Plan) -> Sizes:
        """Sizes of a request of the coordinator, which may hold amplitudes of all sites."""
        shape = (plan.data.num_classes, plan.network.num_features)
        sites = len(plan.members()) or MAX_SITES
        return cls(shape, len(plan.data.structures), amplitude_bytes(plan, sites))

    def bytes_of(self, part: str) -> int:
        """Bytes that a field of the message may have; -1 for a field that does not exist."""
        limits = TEXT_BYTES | {
            "statistics": statistics_bytes(*(self.statistics or (MAX_CLASSES, MAX_FEATURES))),
            "cases": cases_bytes(self.structures),
            "moments": MAX_MOMENT_BYTES,
            "amplitudes": self.amplitudes,
        }
        return limits.get(part, -1)


def amplitude_bytes(plan: Plan, sites: int) -> int:
    """Return the bytes of the amplitudes that so many sites share; 0 if none are shared."""
    ram = plan.method.ram
    if not plan.method.mixes or ram.sharing not in SHARES:
        return 0
    side = math.floor(plan.data.image_size * ram.window) + 1
    window = 2 * side * side
    if ram.sharing == "summary":
        sums = CHANNELS + CHANNELS * (CHANNELS + 1) // 2
        return min(MAX_AMPLITUDE_BYTES, HEAD_BYTES + 8 * window * sums + 64 * sites)
    images = ram.bank_size * sites
    return min(MAX_AMPLITUDE_BYTES, HEAD_BYTES + images * (4 * window * CHANNELS + 128))
