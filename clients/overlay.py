"""`prototypes.memory=overlay`: the global prototypes with the site's own part kept fresh while it trains.

A site compares its pixels with T_global - T_own(last sent) + T_own(running): the other sites as the coordinator knows
them, and itself as it is now (methods.md 1.8). The running part starts from the statistics under the received weights;
each batch replaces the share of it that its pixels are of the site's, so that the site keeps its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from clients.features import batch_statistics
from clients.methods.guidance import Guidance, Guide
from common.plan import Plan
from common.statistics import ClassStatistics

SENT: Final = "sent."


class Overlay:
    """Guide whose own part follows the batches.

    Args:
        others: Statistics of all other sites.
        own: Statistics of this site under the received weights.
        plan: Representation and prototype settings.
        device: Where the loss is computed.
    """

    def __init__(self, others: ClassStatistics, own: ClassStatistics, plan: Plan, device: torch.device) -> None:
        self._others, self._own, self._plan, self._device = others, own, plan, device
        self._weight = own.count

    def after(self, features: Tensor, labels: Tensor) -> Guidance:
        """Take a batch into the own part, then return the prototypes (update before loss, methods.md 1.2 point 7)."""
        batch = batch_statistics(features.detach(), labels, self._plan)
        fraction = np.divide(batch.count, self._weight, out=np.ones_like(batch.count), where=self._weight > 0)
        self._own = self._own.scaled(np.maximum(1.0 - fraction, 0.0)) + batch
        return Guidance.of(self._others + self._own, self._plan.prototypes, self._device)


def keep_statistics(statistics: ClassStatistics | None) -> dict[str, Tensor]:
    """Lay the statistics that leave out as tensors, to be kept with the site's state."""
    if statistics is None:
        return {}
    parts = {"count": statistics.count, "mean": statistics.mean, "scatter": statistics.scatter}
    return {f"{SENT}{name}": torch.from_numpy(array) for name, array in parts.items()}


def sent_statistics(state: Mapping[str, Tensor]) -> ClassStatistics | None:
    """Read what `keep_statistics` laid out; None when the state holds none."""
    if f"{SENT}count" not in state:
        return None
    return ClassStatistics(*(state[f"{SENT}{name}"].numpy() for name in ("count", "mean", "scatter")))


def build_guide(
    prototypes: ClassStatistics | None,
    sent: ClassStatistics | None,
    own: ClassStatistics | None,
    plan: Plan,
    round_number: int,
    device: torch.device,
) -> Guide | None:
    """Return what guides a round's contrastive term; None in the warm-up and for methods without one.

    Args:
        prototypes: Global prototypes from the coordinator.
        sent: What this site last sent and the prototypes hold of it; None when they hold nothing of it.
        own: This site's statistics under the received weights, as they may leave.
        plan: Method and prototype settings.
        round_number: From 1.
        device: Where the loss is computed.
    """
    if not plan.method.contrasts:
        return None
    frozen = Guidance.from_prototypes(prototypes, plan.prototypes, round_number, device)
    if frozen is None or prototypes is None or plan.prototypes.memory != "overlay" or own is None:
        return frozen
    # A contribution that the coordinator refused is not in the prototypes: there is nothing to take out.
    held = sent is not None and bool((sent.count <= prototypes.count).all())
    return Overlay(prototypes.without(sent), own, plan, device) if held and sent is not None else frozen
