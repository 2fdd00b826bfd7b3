"""Aggregation rules: how the sites' models become the global model (`federation.aggregator`).

A rule may keep a state between rounds, for example the moments of a server optimiser. The state is
part of the checkpoint, so that a resumed run continues exactly.

To add a rule, write a function that follows `Aggregator`, register it in `AGGREGATORS`, and add its
name to `common.settings.federation.FederationSettings.aggregator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from fedsgcg.common.settings.federation import FederationSettings
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.robust import clipped_mean, coordinate_median, trimmed_mean
from fedsgcg.server.records.checkpoint import AggregatorState

Parts = Sequence[tuple[str, Weights, float]]
"""(site, weights, FedAvg weight) of each admitted payload."""


class Aggregator(Protocol):
    """One aggregation rule."""

    def __call__(
        self,
        previous: Weights,
        parts: Parts,
        state: AggregatorState,
        settings: FederationSettings,
    ) -> tuple[Weights, AggregatorState]:
        """Return the global model after a round and the rule's state.

        Args:
            previous: Global model before the round.
            parts: (site, weights, FedAvg weight) of each admitted payload.
            state: State after the previous round; empty in the first.
            settings: Settings of the federation.
        """
        ...


def fedavg(
    previous: Weights, parts: Parts, state: AggregatorState, settings: FederationSettings
) -> tuple[Weights, AggregatorState]:
    """Return the weighted mean of the sites' models (McMahan et al. 2017); no state."""
    del previous, settings
    return merge_weights(parts), state


def trimmed(
    previous: Weights, parts: Parts, state: AggregatorState, settings: FederationSettings
) -> tuple[Weights, AggregatorState]:
    """Return the coordinate-wise trimmed mean (`robust.trimmed_mean`); no state."""
    del previous
    return trimmed_mean(parts, settings.tolerated), state


def median(
    previous: Weights, parts: Parts, state: AggregatorState, settings: FederationSettings
) -> tuple[Weights, AggregatorState]:
    """Return the coordinate-wise median (`robust.coordinate_median`); no state."""
    del previous, settings
    return coordinate_median(parts), state


def clipped(
    previous: Weights, parts: Parts, state: AggregatorState, settings: FederationSettings
) -> tuple[Weights, AggregatorState]:
    """Return the mean of updates of bounded length (`robust.clipped_mean`); no state."""
    return clipped_mean(previous, parts, settings.clip), state


AGGREGATORS: Final[Mapping[str, Aggregator]] = {
    "fedavg": fedavg,
    "trimmed_mean": trimmed,
    "median": median,
    "norm_clipping": clipped,
}
"""`federation.aggregator` -> rule."""
