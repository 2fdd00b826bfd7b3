"""An exponential moving average of the global model over the rounds (`federation.ema`).

    a_t = min(d, t / (t + 1)),    mean_t = a_t mean_(t-1) + (1 - a_t) x_t,    t = 0, 1, ...

With the models x_t after each merge and the decay d it starts as their plain mean, so that the
first model has no larger share than the others. Only the coordinator computes it, from models that
it has anyway. The training continues from x_t.

Legend: P floating-point weights.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.records.checkpoint import AggregatorState

MEAN: Final = "ema"
COUNT: Final = "ema_rounds"
"""Entries of the checkpointed state: the mean (P,) float32 and the number of models in it."""


def without_average(state: AggregatorState) -> AggregatorState:
    """Return the state of the aggregation rule alone."""
    return {name: array for name, array in state.items() if name not in (MEAN, COUNT)}


def with_average(
    rule: AggregatorState, previous: AggregatorState, weights: Weights, decay: float
) -> AggregatorState:
    """Add the mean after a round to the state of the aggregation rule.

    Args:
        rule: State of the aggregation rule after the round.
        previous: State after the round before, with its mean; empty at the start.
        weights: The global model after the round.
        decay: d; 0 adds nothing.
    """
    if not decay:
        return rule
    values, count = weights.values.astype(np.float64), 0
    if MEAN in previous:
        count = int(previous[COUNT][0])
        share = min(decay, count / (count + 1))
        values = share * previous[MEAN].astype(np.float64) + (1 - share) * values
    found = dict(rule)
    found[MEAN] = values.astype(np.float32)
    found[COUNT] = np.array([count + 1], np.int64)
    return found


def average_of(state: AggregatorState, last: Weights) -> Weights | None:
    """Return the mean as a model; its integer counters are those of the last model."""
    if MEAN not in state:
        return None
    return Weights(last.layout, state[MEAN].copy(), last.counters)
