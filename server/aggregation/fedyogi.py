"""FedYogi: Yogi at the coordinator, FedAdam with a second moment that changes additively.

    v <- v - (1 - b2) d^2 sign(v - d^2)

Everything else is `fedadam`. A single large update raises v less than with Adam and is forgotten
more slowly. Source: Reddi et al. 2021 (arXiv 2003.00295).
"""

from __future__ import annotations

import numpy as np

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedadam import adaptive_step
from fedsgcg.server.aggregation.parts import MergeContext, Parts
from fedsgcg.server.aggregation.server_step import Array
from fedsgcg.server.records.checkpoint import AggregatorState


def fedyogi(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the previous model after a step of Yogi."""
    return adaptive_step(previous, parts, state, context.settings.fedyogi, additive)


def additive(v: Array, square: Array, beta2: float) -> Array:
    """Return Yogi's second moment; it stays between v and the square, so it is never negative."""
    return np.asarray(v - (1.0 - beta2) * square * np.sign(v - square))
