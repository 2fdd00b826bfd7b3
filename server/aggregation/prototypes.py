"""Global prototypes: what the coordinator remembers of each site's class statistics between rounds.

The memory is kept site by site, and the prototypes of a round are the merge of these parts. So a site that leaves for
good is taken out exactly, by leaving its part out: what remains is what would be there had it never sent statistics.

| memory | a site's new part | the prototypes describe |
| --- | --- | --- |
| `cumulative` | previous + fresh, one pass a round | every round alike |
| `discount` | gamma · previous + fresh, in every round | an exponentially weighted stream |
| `lagged` | the fresh one, of the *received* global model | one model: that of the round before |
| `restart` | the same, exchanged before the round's training | one model: that of this round |
| `overlay` | as `lagged`; a site keeps its own part fresh in training (`running_guide`) | one model, own part now |
| `online` | the sum of the site's training batches so far (`clients.methods.running_guide`) | the stream (the paper) |
| `momentum` | none: mean and covariance of all move a step of beta to the fresh ones | a stream, whatever the counts |

`momentum` is no sum, so nobody can be taken out of it: after a departure it starts anew from the next round's answers.
With `weighting=sites` the sites weigh the same in what is remembered, whatever number of rounds each took part in.

Source: methods.md 1.8 and 1.12. Legend: K classes incl. background, A feature channels, S sites.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from common.settings.plan import PrototypeSettings
from common.statistics import ClassStatistics, between_site_trace, within_site_trace
from server.aggregation.merge import merge_statistics

Fresh = Sequence[tuple[str, ClassStatistics]]
"""(site, statistics) of a round's admitted payloads."""

Parts = Mapping[str, ClassStatistics]
"""Memory by site; with `momentum` one entry, `EVERYBODY`."""

EVERYBODY: Final = ""
LAST_ROUND: Final = ("lagged", "restart", "overlay", "online")
"""Policies that remember the last statistics of each site only."""


@dataclass(frozen=True)
class PrototypeMemory:
    """The policy of `PrototypeSettings.memory` and `.weighting`.

    Attributes:
        settings: The plan's prototype settings.
    """

    settings: PrototypeSettings

    def update(self, previous: Parts, fresh: Fresh) -> dict[str, ClassStatistics]:
        """Return the memory after a round.

        Args:
            previous: Memory before the round, empty at the start.
            fresh: (site, statistics) of the round's admitted payloads; none keeps means and covariances.

        Raises:
            ValueError: A site twice, or statistics of different shapes.
        """
        policy, new = self.settings.memory, dict(fresh)
        if len(new) != len(fresh):
            raise ValueError(
                f"found a site twice in {[site for site, _ in fresh]}, expected each once"
            )
        if policy == "momentum":
            return self._moved(previous, fresh)
        if policy in LAST_ROUND:
            return new or dict(previous)
        gamma = self.settings.discount if policy == "discount" else 1.0
        kept = {site: part.discounted(gamma) for site, part in previous.items()}
        return kept | {
            site: kept[site] + part if site in kept else part for site, part in new.items()
        }

    def prototypes(self, parts: Parts) -> ClassStatistics | None:
        """Return the global prototypes of a memory, None while it is empty; the same bits in whatever order it came."""
        if EVERYBODY in parts:
            return parts[EVERYBODY]
        return merge_statistics(list(parts.items()), self.settings.weighting) if parts else None

    def without(self, parts: Parts, gone: Collection[str]) -> dict[str, ClassStatistics]:
        """Take sites that have left for good out of a memory; `momentum`, which is no sum, is forgotten whole."""
        if gone and EVERYBODY in parts:
            return {}
        return {site: part for site, part in parts.items() if site not in gone}

    def _moved(self, previous: Parts, fresh: Fresh) -> dict[str, ClassStatistics]:
        if not fresh:
            return dict(previous)
        merged = merge_statistics(fresh, self.settings.weighting)
        return {
            EVERYBODY: momentum_update(previous[EVERYBODY], merged, self.settings.momentum)
            if previous
            else merged
        }

    def shift(self, fresh: Fresh) -> dict[str, list[float]]:
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


def momentum_update(
    previous: ClassStatistics, fresh: ClassStatistics, beta: float
) -> ClassStatistics:
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
    memory: PrototypeMemory,
    prototypes: ClassStatistics,
    fresh: Fresh,
    classes: Sequence[str],
    number: int,
) -> list[dict[str, Any]]:
    """Return the round's rows on prototypes: shift and count of every class (phase `merge`, all sites).

    Args:
        memory: The policy.
        prototypes: Prototypes after the round.
        fresh: (site, statistics) of the round's admitted payloads.
        classes: K class names.
        number: Number of the round.
    """
    figures = {"prototype_count": prototypes.count.tolist()} | (
        memory.shift(fresh) if fresh else {}
    )
    return _class_rows(figures, classes, number)


def evaluation_rows(
    memory: PrototypeMemory, fresh: Fresh, classes: Sequence[str], number: int
) -> list[dict[str, Any]]:
    """Return the rows on the shift of the chosen model, every site under the normalisation of evaluation."""
    figures = {f"{metric}_evaluation": values for metric, values in memory.shift(fresh).items()}
    return _class_rows(figures, classes, number)


def _class_rows(
    figures: Mapping[str, list[float]], classes: Sequence[str], number: int
) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "phase": "merge",
            "site": "",
            "cls": name,
            "metric": metric,
            "value": value,
        }
        for metric, values in figures.items()
        for name, value in zip(classes, values, strict=True)
        if not np.isnan(value)
    ]
