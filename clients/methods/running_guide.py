"""Prototypes that are updated with every batch of a round.

`prototypes.memory=overlay` uses the global prototypes with an up-to-date own part, T_global -
T_own(last sent) + T_own(running). The other sites' part is the one that the coordinator sent. The
running part starts from the statistics under the received weights. A batch replaces a share of it
equal to the batch's share of the site's pixels, so that the site keeps its weight.

`prototypes.memory=online` is the paper's update (SgCG eqs. 2-3). Every batch is merged into the
statistics of all earlier batches before its loss is computed, from the first step on. If one client
has all domains this is the paper's algorithm. A site of a federation updates its own part and uses
the other sites' part from the coordinator.

Both update before the loss, as in the algorithm of the SgCG paper. See "Statistics" in
docs/explanation/sgcg.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fedsgcg.clients.methods.class_statistics import batch_statistics
from fedsgcg.clients.methods.guidance import Guidance, Guide
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics

SENT: Final = "sent."
ONLINE: Final = "online."


class Overlay:
    """Guide whose own part is gradually replaced, batch by batch.

    Args:
        others: Statistics of all other sites.
        own: Statistics of this site under the received weights.
        plan: Representation and prototype settings.
        device: Device of the loss.
    """

    def __init__(
        self, others: ClassStatistics, own: ClassStatistics, plan: Plan, device: torch.device
    ) -> None:
        self._others = others
        self._own = own
        self._plan = plan
        self._device = device
        self._weight = own.count

    def after(self, features: Tensor, labels: Tensor) -> Guidance | None:
        """Update the own part with a batch, then return the prototypes."""
        batch = batch_statistics(features.detach(), labels, self._plan)
        fraction = np.divide(
            batch.count, self._weight, out=np.ones_like(batch.count), where=self._weight > 0
        )
        self._own = self._own.scaled(np.maximum(1.0 - fraction, 0.0)) + batch
        return Guidance.of(self._others + self._own, self._plan.prototypes, self._device)

    def state(self) -> dict[str, Tensor]:
        """Return nothing; each round starts from the statistics under the received weights."""
        return {}


class Online:
    """Guide to which every batch is added (SgCG eqs. 2-3).

    Args:
        others: Statistics of all other sites.
        own: Statistics of this site's batches so far, over all rounds.
        plan: Representation and prototype settings.
        round_number: From 1; in the warm-up, batches are added but no prototypes are returned.
        device: Device of the loss.
    """

    def __init__(
        self,
        others: ClassStatistics,
        own: ClassStatistics,
        plan: Plan,
        round_number: int,
        device: torch.device,
    ) -> None:
        self._others = others
        self._own = own
        self._plan = plan
        self._device = device
        self._compares = round_number > plan.prototypes.warmup_rounds

    def after(self, features: Tensor, labels: Tensor) -> Guidance | None:
        """Add a batch, then return the prototypes; None in the warm-up."""
        self._own = self._own + batch_statistics(features.detach(), labels, self._plan)
        if not self._compares:
            return None
        return Guidance.of(self._others + self._own, self._plan.prototypes, self._device)

    def state(self) -> dict[str, Tensor]:
        """Return the statistics of all batches, from which the next round continues."""
        return statistics_to_state(self._own, ONLINE)


def statistics_to_state(
    statistics: ClassStatistics | None, prefix: str = SENT
) -> dict[str, Tensor]:
    """Return statistics as tensors for the site's state."""
    if statistics is None:
        return {}
    parts = {"count": statistics.count, "mean": statistics.mean, "scatter": statistics.scatter}
    return {f"{prefix}{name}": torch.from_numpy(array) for name, array in parts.items()}


def statistics_from_state(
    state: Mapping[str, Tensor], prefix: str = SENT
) -> ClassStatistics | None:
    """Read the result of `statistics_to_state` from a state; None if there is none."""
    if f"{prefix}count" not in state:
        return None
    return ClassStatistics(
        *(state[f"{prefix}{name}"].numpy() for name in ("count", "mean", "scatter"))
    )


def other_sites(
    prototypes: ClassStatistics, sent: ClassStatistics | None, held: Collection[str]
) -> ClassStatistics:
    """Return the prototypes without this site's own part.

    Only the coordinator knows whether the prototypes include what the site last sent: a reply may
    have been late or refused, and then there is nothing to subtract.

    Args:
        prototypes: Global prototypes.
        sent: Statistics that this site last sent.
        held: Digests of the site statistics that the prototypes include.
    """
    if sent is None or sent.digest() not in held:
        return prototypes
    return prototypes.without(sent)


def build_guide(
    prototypes: ClassStatistics | None,
    state: Mapping[str, Tensor],
    own: ClassStatistics | None,
    plan: Plan,
    round_number: int,
    device: torch.device,
    held: Collection[str] = (),
    shift: ClassStatistics | None = None,
) -> Guide | None:
    """Return the guide of a round; None for methods that use no statistics of other sites.

    Also None in the warm-up, except with `prototypes.memory=online`.

    Args:
        prototypes: Global prototypes from the coordinator.
        state: The site's state after its last round.
        own: This site's statistics under the received weights, after the privacy floors.
        plan: Method and prototype settings.
        round_number: From 1.
        device: Device of the loss.
        held: Digests of the site statistics that the prototypes include.
        shift: What the coordinator sent of the differences between sites.
    """
    if plan.method.describes_projections:
        return Guidance.of_projections(shift, device)
    if not plan.method.contrasts:
        return None
    memory = plan.prototypes.memory
    empty = ClassStatistics.empty(plan.data.num_classes, plan.network.num_features)
    others = other_sites(prototypes or empty, statistics_from_state(state), held)
    if memory == "online":
        return Online(
            others, statistics_from_state(state, ONLINE) or empty, plan, round_number, device
        )
    frozen = Guidance.from_prototypes(prototypes, plan.prototypes, round_number, device)
    if memory != "overlay" or own is None or frozen is None:
        return frozen.with_shift(shift) if frozen is not None else None
    return Overlay(others, own, plan, device)
