"""Aggregation rules: how the sites' models become the global model (`federation.aggregator`).

A rule may keep a state between rounds, for example the moments of a server optimiser. The state is
part of the checkpoint, so that a resumed run continues exactly.

To add a rule, write a function that follows `Aggregator`, register it in `AGGREGATORS`, and add its
name to `common.settings.federation.FederationSettings.aggregator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.records.checkpoint import AggregatorState


class Aggregator(Protocol):
    """One aggregation rule."""

    def __call__(
        self,
        previous: Weights,
        parts: Sequence[tuple[str, Weights, float]],
        state: AggregatorState,
    ) -> tuple[Weights, AggregatorState]:
        """Return the global model after a round and the rule's state.

        Args:
            previous: Global model before the round.
            parts: (site, weights, FedAvg weight) of each admitted payload.
            state: State after the previous round; empty in the first.
        """
        ...


def fedavg(
    previous: Weights, parts: Sequence[tuple[str, Weights, float]], state: AggregatorState
) -> tuple[Weights, AggregatorState]:
    """Return the weighted mean of the sites' models (McMahan et al. 2017); no state."""
    del previous
    return merge_weights(parts), state


AGGREGATORS: Final[Mapping[str, Aggregator]] = {"fedavg": fedavg}
"""`federation.aggregator` -> rule."""
