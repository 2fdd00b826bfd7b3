"""Aggregation rules: how the sites' models become the global model (`federation.aggregator`).

A rule may keep a state between rounds, for example the moments of a server optimiser. The state is
part of the checkpoint, so that a resumed run continues exactly; an entry of a single site is named
`quantity/site` (`parts.entry`) and disappears with the site.

To add a rule, write a function that follows `Aggregator`, register it in `AGGREGATORS`, and add its
name to `common.settings.aggregation.Aggregator`. A rule that sends the sites more than the model is
also in `additions`. Formulas: docs/explanation/aggregation.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from fedsgcg.common.wire.messages import SHARES
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedadam import fedadam
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.fedavgm import fedavgm
from fedsgcg.server.aggregation.fedce import fedce, merged_shares
from fedsgcg.server.aggregation.feddg_ga import feddg_ga
from fedsgcg.server.aggregation.fedyogi import fedyogi
from fedsgcg.server.aggregation.krum import krum
from fedsgcg.server.aggregation.parts import MergeContext, Parts
from fedsgcg.server.aggregation.robust import clipped_mean, coordinate_median, trimmed_mean
from fedsgcg.server.aggregation.scaffold import global_control, scaffold
from fedsgcg.server.records.checkpoint import AggregatorState


class Aggregator(Protocol):
    """One aggregation rule."""

    def __call__(
        self,
        previous: Weights,
        parts: Parts,
        state: AggregatorState,
        context: MergeContext,
    ) -> tuple[Weights, AggregatorState]:
        """Return the global model after a round and the rule's state.

        Args:
            previous: Global model before the round.
            parts: (site, weights, FedAvg weight) of each admitted payload.
            state: State after the previous round; empty in the first.
            context: Settings, number of the round, and what else the sites sent.
        """
        ...


def fedavg(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the weighted mean of the sites' models (McMahan et al. 2017); no state.

    Also FedProx and FedBN, which differ from it at the sites (`clients.corrections`,
    `clients.own_norm`).
    """
    del previous, context
    return merge_weights(parts), state


def trimmed(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the coordinate-wise trimmed mean (`robust.trimmed_mean`); no state."""
    del previous
    return trimmed_mean(parts, context.settings.tolerated), state


def median(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the coordinate-wise median (`robust.coordinate_median`); no state."""
    del previous, context
    return coordinate_median(parts), state


def clipped(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the mean of updates of bounded length (`robust.clipped_mean`); no state."""
    return clipped_mean(previous, parts, context.settings.clip), state


AGGREGATORS: Final[Mapping[str, Aggregator]] = {
    "fedavg": fedavg,
    "fedprox": fedavg,
    "fedbn": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "scaffold": scaffold,
    "feddg_ga": feddg_ga,
    "fedce": fedce,
    "trimmed_mean": trimmed,
    "median": median,
    "norm_clipping": clipped,
    "krum": krum,
}
"""`federation.aggregator` -> rule."""


@dataclass(frozen=True)
class Addition:
    """What a rule sends to the sites with a training request.

    Attributes:
        options: Options of the request.
        control_variates: SCAFFOLD's global control variate (L,).
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    control_variates: npt.NDArray[np.float32] | None = None


def additions(name: str, state: AggregatorState) -> Addition:
    """Return what a rule sends to the sites besides the model.

    Args:
        name: `federation.aggregator`.
        state: The rule's state after the previous round.
    """
    if name == "scaffold":
        return Addition(control_variates=global_control(state))
    if name == "fedce" and (shares := merged_shares(state)):
        return Addition({SHARES: shares})
    return Addition()
