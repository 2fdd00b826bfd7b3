"""FedAvgM: SGD with momentum at the coordinator.

    v <- beta v + (x - mean),   x <- x - eta v

Source: Hsu et al. 2019 (arXiv 1909.06335). State: `momentum` (L,) float64.
"""

from __future__ import annotations

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.parts import MergeContext, Parts
from fedsgcg.server.aggregation.server_step import mean_update, stepped
from fedsgcg.server.records.checkpoint import AggregatorState


def fedavgm(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the previous model moved by the momentum of the mean updates."""
    settings = context.settings.fedavgm
    merged = merge_weights(parts)
    momentum = -mean_update(previous, merged)
    if "momentum" in state:
        momentum += settings.momentum * state["momentum"]
    return stepped(previous, merged, -settings.rate * momentum), {"momentum": momentum}
