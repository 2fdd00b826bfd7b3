"""What the models of sites without labels count for in a merge.

A site of role `unlabelled` trains the encoder and the training-only heads, and returns the other
weights as it received them. In a weighted mean these would shorten the step of the decoder by the
site's share. They are therefore replaced by the weighted mean of the sites with labels, before any
aggregation rule sees them: under FedAvg this is the same as leaving the site out of the mean of the
decoder, and nothing that such a site sends can reach the decoder. For the encoder its FedAvg weight
is that of any site, its number of training slices, or equal with `federation.weighting=sites`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from fedsgcg.common.heads import CHILD
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights

TRAINED: Final = ("encoder.", f"{CHILD}.")
"""Prefixes of the entries that a site without labels trains."""

Part = tuple[str, Weights, float]


def with_labelled_decoder(
    parts: Sequence[Part], unlabelled: Collection[str], received: Weights
) -> list[Part]:
    """Replace the decoder in the models of sites without labels.

    Args:
        parts: (site, weights, FedAvg weight) of each admitted payload.
        unlabelled: Names of the sites without labels.
        received: The model that the sites received, whose decoder is kept if no site with labels
            was admitted.

    Returns:
        The parts in the same order.
    """
    without = [part for part in parts if part[0] in unlabelled]
    if not without:
        return list(parts)
    labelled = [part for part in parts if part[0] not in unlabelled]
    source = merge_weights(labelled) if labelled else received
    return [
        (site, _joined(weights, source), share) if site in unlabelled else (site, weights, share)
        for site, weights, share in parts
    ]


def _joined(trained: Weights, source: Weights) -> Weights:
    """Return `source` with the entries of `trained` that a site without labels trains."""
    values = source.values.copy()
    state = Weights(source.layout, values, ()).to_state()  # views into `values`
    for name, array in trained.to_state().items():
        if name.startswith(TRAINED) and name in state:
            state[name][...] = array
    counters = dict(source.counters) | {
        name: value for name, value in trained.counters if name.startswith(TRAINED)
    }
    return Weights(source.layout, np.asarray(values), tuple(counters.items()))
