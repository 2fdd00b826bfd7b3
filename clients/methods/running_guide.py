"""Prototypes that follow the batches of a round: what a site compares its pixels with while it trains.

`prototypes.memory=overlay`: the global prototypes with the site's own part kept fresh, T_global - T_own(last sent) +
T_own(running): the other sites as the coordinator knows them, and itself as it is now (methods.md 1.8). The running
part starts from the statistics under the received weights; each batch replaces the share of it that its pixels are of
the site's, so that the site keeps its weight.

`prototypes.memory=online`: the paper's update (eqs. 2-3). Every batch is added to the statistics before its loss is
taken, from the first step on, with count, mean and covariance of all earlier batches kept. Where one client owns all
domains this is the paper's algorithm; a site of a federation does it with its own part, about the others' as the
coordinator knows them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from clients.methods.class_statistics import batch_statistics
from clients.methods.guidance import Guidance, Guide
from common.settings.plan import Plan
from common.statistics import ClassStatistics

SENT: Final = "sent."
ONLINE: Final = "online."


class Overlay:
    """Guide whose own part is replaced batch by batch.

    Args:
        others: Statistics of all other sites.
        own: Statistics of this site under the received weights.
        plan: Representation and prototype settings.
        device: Where the loss is computed.
    """

    def __init__(
        self, others: ClassStatistics, own: ClassStatistics, plan: Plan, device: torch.device
    ) -> None:
        self._others, self._own, self._plan, self._device = others, own, plan, device
        self._weight = own.count

    def after(self, features: Tensor, labels: Tensor) -> Guidance | None:
        """Take a batch into the own part, then return the prototypes (update before loss, methods.md 1.2 point 7)."""
        batch = batch_statistics(features.detach(), labels, self._plan)
        fraction = np.divide(
            batch.count, self._weight, out=np.ones_like(batch.count), where=self._weight > 0
        )
        self._own = self._own.scaled(np.maximum(1.0 - fraction, 0.0)) + batch
        return Guidance.of(self._others + self._own, self._plan.prototypes, self._device)

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the own part starts anew from the received weights."""
        return {}


class Online:
    """Guide to which every batch is added (eqs. 2-3).

    Args:
        others: Statistics of all other sites.
        own: Sum of this site's batches so far, over all rounds.
        plan: Representation and prototype settings.
        round_number: In the warm-up the batches are added and nothing is compared.
        device: Where the loss is computed.
    """

    def __init__(
        self,
        others: ClassStatistics,
        own: ClassStatistics,
        plan: Plan,
        round_number: int,
        device: torch.device,
    ) -> None:
        self._others, self._own, self._plan, self._device = others, own, plan, device
        self._compares = round_number > plan.prototypes.warmup_rounds

    def after(self, features: Tensor, labels: Tensor) -> Guidance | None:
        """Add a batch, then return the prototypes (update before loss, methods.md 1.2 point 7)."""
        self._own = self._own + batch_statistics(features.detach(), labels, self._plan)
        if not self._compares:
            return None
        return Guidance.of(self._others + self._own, self._plan.prototypes, self._device)

    def state(self) -> dict[str, Tensor]:
        """Return the sum of all batches, from which the next round goes on."""
        return keep_statistics(self._own, ONLINE)


def keep_statistics(statistics: ClassStatistics | None, prefix: str = SENT) -> dict[str, Tensor]:
    """Return statistics as tensors, to be kept with the site's state."""
    if statistics is None:
        return {}
    parts = {"count": statistics.count, "mean": statistics.mean, "scatter": statistics.scatter}
    return {f"{prefix}{name}": torch.from_numpy(array) for name, array in parts.items()}


def kept_statistics(state: Mapping[str, Tensor], prefix: str = SENT) -> ClassStatistics | None:
    """Read what `keep_statistics` returned; None when the state has none."""
    if f"{prefix}count" not in state:
        return None
    return ClassStatistics(
        *(state[f"{prefix}{name}"].numpy() for name in ("count", "mean", "scatter"))
    )


def other_sites(
    prototypes: ClassStatistics, sent: ClassStatistics | None, held: Collection[str]
) -> ClassStatistics:
    """Return the prototypes without this site's own part.

    Only the coordinator knows whether it holds what the site last sent: a contribution may have come late or have been
    refused, and then there is nothing to take out.

    Args:
        prototypes: Global prototypes.
        sent: What this site last sent.
        held: Digests of the parts that the prototypes are made of.
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
) -> Guide | None:
    """Return what guides a round's contrastive term; None in the warm-up and for methods without one.

    Args:
        prototypes: Global prototypes from the coordinator.
        state: What the site keeps since its last round.
        own: This site's statistics under the received weights, as they may leave.
        plan: Method and prototype settings.
        round_number: From 1.
        device: Where the loss is computed.
        held: Digests of the sites' parts that the prototypes are made of.
    """
    if not plan.method.contrasts:
        return None
    memory = plan.prototypes.memory
    nothing = ClassStatistics.empty(plan.data.num_classes, plan.network.num_features)
    others = other_sites(prototypes or nothing, kept_statistics(state), held)
    if memory == "online":
        return Online(others, kept_statistics(state, ONLINE) or nothing, plan, round_number, device)
    frozen = Guidance.from_prototypes(prototypes, plan.prototypes, round_number, device)
    if memory != "overlay" or own is None or frozen is None:
        return frozen
    return Overlay(others, own, plan, device)
