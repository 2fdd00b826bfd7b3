"""Sizes of messages that follow from a plan; see `common.wire.sizes`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from fedsgcg.common.names import MAX_CLASSES
from fedsgcg.common.settings.federation import SHARES
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.amplitudes import MAX_BYTES
from fedsgcg.common.wire.payload import HEAD_BYTES
from fedsgcg.common.wire.sizes import MAX_WEIGHTS, Sizes

MAX_SITES: Final = 100
"""Hospitals of a federation whose sites are not listed in the plan."""

MOST_CHANNELS: Final = 2**20
"""Moments of BatchNorm layers, counters and figures of a secure sum."""

CHANNELS: Final = 3
"""Channels of every training slice: colours, or a slice and its neighbours."""


def reply_sizes(plan: Plan, weights: int = MAX_WEIGHTS) -> Sizes:
    """Return the sizes of a site's reply to a request with a model of so many values."""
    blocks = plan.prototypes.blocks if plan.prototypes.shared == "means" else 0
    return replace(_sizes(plan, 1, weights), codec=plan.federation.codec, shift=0, blocks=blocks)


def request_sizes(plan: Plan) -> Sizes:
    """Return the sizes of the coordinator's request, which may hold amplitudes of all sites."""
    most = {"": 0, "between": plan.data.num_classes, "sites": MAX_CLASSES, "others": 1}
    shift = most[plan.shift]
    sites = len(plan.members()) or MAX_SITES
    return replace(_sizes(plan, sites, MAX_WEIGHTS), shift=shift, blocks=0)


def amplitude_bytes(plan: Plan, sites: int) -> int:
    """Return the bytes of the amplitudes that so many sites share; 0 if none are shared."""
    ram = plan.method.ram
    if not plan.method.mixes or ram.sharing not in SHARES:
        return 0
    side = math.floor(plan.data.image_size * ram.window) + 1
    window = 2 * side * side
    if ram.sharing == "summary":
        sums = CHANNELS + CHANNELS * (CHANNELS + 1) // 2
        return min(MAX_BYTES, HEAD_BYTES + 8 * window * sums + 64 * sites)
    images = ram.bank_size * sites
    return min(MAX_BYTES, HEAD_BYTES + images * (4 * window * CHANNELS + 128))


def _sizes(plan: Plan, sites: int, weights: int) -> Sizes:
    shape = plan.described_shape
    structures, amplitudes = len(plan.data.structures), amplitude_bytes(plan, sites)
    return Sizes(shape, structures, amplitudes, weights, masked=_masked(plan, weights))


def _masked(plan: Plan, weights: int) -> int:
    """Return the numbers of a site in a secure sum; 0 if the plan has none."""
    if not plan.privacy.secure_sums.enabled:
        return 0
    features = plan.network.num_features
    return weights + plan.data.num_classes * features * (features + 3) + MOST_CHANNELS
