"""Krum and Multi-Krum: the models nearest to the others.

The score of a model is the sum of its squared distances to its S - f - 2 nearest other models, at
least one; f is `federation.tolerated`. Krum returns the model with the lowest score, Multi-Krum the
weighted mean of the `krum.selected` lowest. Of equal scores the earlier name wins. Distances are
those of the updates' learnable weights in float64: distances of whole models in float32 lose an
update that is small against the model.

Source: Blanchard et al. 2017 (NeurIPS). The guarantee needs S >= 2 f + 3. No state. Legend: S
sites.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.parts import MergeContext, Parts, sorted_by_site
from fedsgcg.server.records.checkpoint import AggregatorState
from fedsgcg.server.screening.weights import Model, Updates


def krum(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the mean of the models with the lowest scores."""
    ordered = sorted_by_site(parts)
    updates = Updates.of([Model(site, weights) for site, weights, _ in ordered], previous)
    scores = krum_scores(updates.gram, context.settings.tolerated)
    best = np.argsort(scores, kind="stable")[: context.settings.krum.selected]
    return merge_weights([ordered[k] for k in best]), state


def krum_scores(gram: npt.NDArray[np.float64], tolerated: int) -> npt.NDArray[np.float64]:
    """Return (S,) scores from the inner products of the updates (S, S)."""
    square = np.diag(gram)
    distances = np.maximum(square[:, None] + square[None, :] - 2.0 * gram, 0.0)
    others = len(gram) - 1
    nearest = min(max(len(gram) - tolerated - 2, 1), others)
    np.fill_diagonal(distances, np.inf)
    return np.asarray(np.sort(distances, axis=1)[:, :nearest].sum(axis=1))
