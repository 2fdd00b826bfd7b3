"""Global prototypes: what the coordinator remembers of the sites' class statistics between rounds.

| memory | new memory | describes |
| --- | --- | --- |
| `cumulative` | previous + sum of the fresh ones | every round alike (the paper) |
| `discount` | gamma · previous + sum of the fresh ones | an exponentially weighted stream |
| `lagged` | sum of the fresh ones, each of the *received* global model | one model: that of the round before |
| `restart` | the same, exchanged before the round's training | one model: that of this round |
| `momentum` | a step of beta from the previous mean and covariance to the fresh ones | a stream, whatever the counts |
| `overlay` | as `lagged`; a site keeps its own part fresh in training (`clients.overlay`) | one model, own part now |

Source: methods.md 1.8 and 1.12. Legend: K classes incl. background, A feature channels, S sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.plan import PrototypeSettings
from common.statistics import ClassStatistics, between_site_trace, within_site_trace
from server.merge import merge_statistics

Parts = Sequence[tuple[str, ClassStatistics]]


@dataclass(frozen=True)
class PrototypeMemory:
    """The policy of `PrototypeSettings.memory` and `.weighting`.

    Attributes:
        settings: The plan's prototype settings.
    """

    settings: PrototypeSettings

    def update(self, previous: ClassStatistics | None, fresh: Parts) -> ClassStatistics | None:
        """Return the memory after a round.

        Args:
            previous: Memory before the round, None at the start.
            fresh: (site, statistics) of the round's admitted payloads; none keeps `previous`.

        Raises:
            ValueError: A site twice, or statistics of different shapes.
        """
        if not fresh:
            return previous
        merged = merge_statistics(fresh, self.settings.weighting)
        if previous is None or self.settings.memory in ("lagged", "restart", "overlay"):
            return merged
        if self.settings.memory == "momentum":
            return moved(previous, merged, self.settings.momentum)
        kept = previous.discounted(self.settings.discount) if self.settings.memory == "discount" else previous
        return kept + merged

    def shift(self, fresh: Parts) -> dict[str, list[float]]:
        """Return the domain shift of a round's statistics, one value a class (NaN where no site has seen it).

        Returns:
            `between_site_trace` and `within_site_trace`, (K,) each: the two parts of the pooled covariance's trace.
        """
        parts = [part for _, part in sorted(fresh, key=lambda part: part[0])]
        if self.settings.weighting == "sites":
            parts = [part.weighted_equally() for part in parts]
        return {
            "between_site_trace": between_site_trace(parts).tolist(),
            "within_site_trace": within_site_trace(parts).tolist(),
        }


def moved(previous: ClassStatistics, fresh: ClassStatistics, beta: float) -> ClassStatistics:
    """Move mean and covariance a share of the way to the fresh ones, whatever the counts (methods.md 1.8).

    mean += beta d, covariance = (1-beta) S + beta S' + beta (1-beta) d d^T with d = fresh mean - mean: the mixture of
    both at the weights 1-beta and beta. A class absent on one side is taken from the other.

    Returns:
        The mixture, counted as the fresh pixels, or the previous ones where there are none.
    """
    keep = previous.weighted_equally().scaled(np.where(fresh.count > 0, 1.0 - beta, 1.0))
    take = fresh.weighted_equally().scaled(np.where(previous.count > 0, beta, 1.0))
    mixture = keep + take
    count = np.where(fresh.count > 0, fresh.count, previous.count)
    return ClassStatistics(count, mixture.mean, mixture.covariance * count[:, None, None])


def prototype_rows(
    memory: PrototypeMemory, prototypes: ClassStatistics, fresh: Parts, classes: Sequence[str], number: int
) -> list[dict[str, Any]]:
    """Return the round's rows on prototypes: shift and count of every class (phase `merge`, all sites).

    Args:
        memory: The policy.
        prototypes: Memory after the round.
        fresh: (site, statistics) of the round's admitted payloads.
        classes: K class names.
        number: Number of the round.
    """
    figures = {"prototype_count": prototypes.count.tolist()} | (memory.shift(fresh) if fresh else {})
    return [
        {"round": number, "phase": "merge", "site": "", "cls": name, "metric": metric, "value": value}
        for metric, values in figures.items()
        for name, value in zip(classes, values, strict=True)
        if not np.isnan(value)
    ]
