"""Merging with weights of the sites that a rule has computed."""

from __future__ import annotations

from collections.abc import Mapping

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.parts import Parts


def merge_with(parts: Parts, weights: Mapping[str, float]) -> Weights:
    """Return the mean of the models with these weights, relative to each other.

    A site of weight zero is left out; where all have it, the weights are those of FedAvg.

    Args:
        parts: (site, weights, FedAvg weight) of each admitted payload.
        weights: Weight of each of these sites, zero or more.
    """
    chosen = [(site, model, weights[site]) for site, model, _ in parts if weights[site] > 0]
    return merge_weights(chosen or parts)
