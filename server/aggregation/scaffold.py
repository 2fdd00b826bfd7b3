"""SCAFFOLD: control variates that correct the drift of each site towards its own optimum.

Every site adds c - c_s to its gradients and returns its next c_s, the mean of its own gradients
(`clients.corrections`). The coordinator merges

    x <- x + eta_g (mean - x),   c = sum_s w_s c_s

with the weights w_s of FedAvg; with `federation.weighting=sites` c is the paper's plain mean. The
weights of both means must be the same, because the corrections of all sites then cancel:
sum_s w_s (c - c_s) = 0.

Sites send c_s itself, not its change. A reply that was late or refused then does no harm: c is the
mean of the variates that the coordinator has, while a sum of changes would stay wrong for ever. The
last variate of every site is kept, so that a departed site can be taken out.

Source: Karimireddy et al. 2020 (arXiv 1910.06378), option II. State: `control/<site>` (L,) float32,
`share/<site>` (1,) float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.parts import (
    MergeContext,
    Parts,
    by_site,
    entry,
    number_of,
    numbers_by_site,
    sorted_by_site,
)
from fedsgcg.server.aggregation.server_step import mean_update, stepped
from fedsgcg.server.records.checkpoint import AggregatorState


def scaffold(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the previous model moved along the mean update, and the sites' control variates."""
    merged = merge_weights(parts)
    rate = context.settings.scaffold.rate
    if rate != 1.0:
        merged = stepped(previous, merged, rate * mean_update(previous, merged))
    known = dict(state)
    for site, _, share in sorted_by_site(parts):
        known[entry("control", site)] = context.control_variates[site]
        known[entry("share", site)] = number_of(share)
    return merged, known


def global_control(state: AggregatorState) -> npt.NDArray[np.float32] | None:
    """Return c (L,), the weighted mean of the sites' control variates; None before the first."""
    controls, shares = by_site(state, "control"), numbers_by_site(state, "share")
    if not controls:
        return None
    total = np.zeros(next(iter(controls.values())).shape, np.float64)
    for site, control in controls.items():
        total += shares[site] * control.astype(np.float64)
    return np.asarray(total / sum(shares[site] for site in controls), np.float32)
