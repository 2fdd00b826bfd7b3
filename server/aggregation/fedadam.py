"""FedAdam: Adam at the coordinator.

    d = mean - x,   m <- b1 m + (1 - b1) d,   v <- b2 v + (1 - b2) d^2
    x <- x + eta m / (sqrt(v) + tau),   m_0 = 0,   v_0 = tau^2

There is no bias correction, and v starts at tau^2 (Algorithm 2 of the source), so that the first
step is bounded by eta (1 - b1) / sqrt(1 - b2). Source: Reddi et al. 2021 (arXiv 2003.00295). State:
`m`, `v` (L,) float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedsgcg.common.settings.aggregation import AdaptiveSettings
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.parts import MergeContext, Parts
from fedsgcg.server.aggregation.server_step import Array, mean_update, stepped
from fedsgcg.server.records.checkpoint import AggregatorState

SecondMoment = Callable[[Array, Array, float], Array]
"""(v, d^2, b2) -> the next v."""


def fedadam(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the previous model after a step of Adam."""
    return adaptive_step(previous, parts, state, context.settings.fedadam, exponential)


def exponential(v: Array, square: Array, beta2: float) -> Array:
    """Return Adam's second moment, an exponential mean."""
    return beta2 * v + (1.0 - beta2) * square


def adaptive_step(
    previous: Weights,
    parts: Parts,
    state: AggregatorState,
    settings: AdaptiveSettings,
    second_moment: SecondMoment,
) -> tuple[Weights, AggregatorState]:
    """Return the model after an adaptive step, and the moments."""
    merged = merge_weights(parts)
    update = mean_update(previous, merged)
    m = (1.0 - settings.beta1) * update
    v = np.full_like(update, settings.tau**2)
    if "m" in state:
        m += settings.beta1 * state["m"]
        v = np.asarray(state["v"], np.float64)
    v = second_moment(v, np.square(update), settings.beta2)
    change = settings.rate * m / (np.sqrt(v) + settings.tau)
    return stepped(previous, merged, change), {"m": m, "v": v}
