"""Global prototypes: each site's class statistics, remembered between rounds and merged.

The memory has one part per site, and the prototypes of a round are the merge of these parts. A site
that leaves is therefore removed exactly: the remaining parts are what they would be had the site
never sent statistics.

| memory | a site's new part | the prototypes describe |
| --- | --- | --- |
| `cumulative` | previous + fresh, one pass per round | every round equally |
| `discount` | gamma · previous + fresh, in every round | an exponentially weighted stream |
| `lagged` | the fresh one, of the *received* model | the model of the previous round |
| `restart` | the same, exchanged before the round's training | the model of this round |
| `overlay` | as `lagged`; the site updates it in training | as `lagged`, own part current |
| `online` | the sum of the site's training batches so far | the stream (as in the paper) |
| `momentum` | none: merged mean and covariance move by beta | a stream, regardless of counts |

The site's side of `overlay` and `online` is `clients.methods.running_guide`. `momentum` is not a
sum, so no site can be removed from it: after a departure it restarts from the next round's answers.
With `weighting=sites` all sites have the same weight, regardless of how many rounds each took part
in.

Source: docs/explanation/sgcg.md, "Statistics" and "Federated". Legend: K classes incl. background,
A feature channels, S sites.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import add
from typing import Any, Final, Literal

import numpy as np

from fedsgcg.common.frechet import class_distances, mean_distance_to_others
from fedsgcg.common.settings.plan import PrototypeSettings
from fedsgcg.common.statistics import ClassStatistics, between_site_trace, within_site_trace
from fedsgcg.server.aggregation.class_statistics import merge_statistics, without_farthest
from fedsgcg.server.aggregation.parts import sorted_by_site
from fedsgcg.server.sites.replies import ALL_SITES

Fresh = Sequence[tuple[str, ClassStatistics]]
"""(site, statistics) of a round's admitted payloads."""

Parts = Mapping[str, ClassStatistics]
"""Memory by site; with `momentum` and with secure sums one entry, `ALL_SITES`."""

LAST_ROUND: Final = ("lagged", "restart", "overlay", "online")
"""Policies that remember only the last statistics of each site."""


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
            fresh: (site, statistics) of the round's admitted payloads; without any, means and
                covariances are kept.

        Raises:
            ValueError: A duplicate site, or statistics of different shapes.
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
        for site, part in new.items():
            kept[site] = kept[site] + part if site in kept else part
        return kept

    def prototypes(self, parts: Parts) -> ClassStatistics | None:
        """Return the global prototypes of a memory, None if it is empty.

        The result does not depend on the order of the parts.
        """
        if ALL_SITES in parts:
            return parts[ALL_SITES]
        return self.merged(list(parts.items())) if parts else None

    def merged(self, parts: Fresh) -> ClassStatistics:
        """Merge the statistics of several sites by the plan's settings."""
        return merge_statistics(parts, self.settings.weighting, self.settings.trimmed)

    def differences(
        self, wanted: Literal["", "between", "sites", "others"], parts: Parts
    ) -> ClassStatistics | None:
        """Return what all sites receive of the differences between them (`Plan.shift`)."""
        if wanted in ("", "others") or not parts:
            return None
        return self.by_site(parts) if wanted == "sites" else self.between(parts)

    def between(self, parts: Parts) -> ClassStatistics:
        """Return the covariances of the sites' means as class statistics, scatter n_k B_k.

        With the weights of the prototypes.
        """
        known = self._separate(parts)
        points = [ClassStatistics(p.count, p.mean, np.zeros_like(p.scatter)) for p in known]
        return reduce(add, points)

    def by_site(self, parts: Parts) -> ClassStatistics:
        """Return the statistics of every site one after the other, S K classes, without names.

        Their counts are the sites' weights in the prototypes.
        """
        known = self._separate(parts)
        return ClassStatistics(
            np.concatenate([part.count for part in known]),
            np.concatenate([part.mean for part in known]),
            np.concatenate([part.scatter for part in known]),
        )

    def others(self, parts: Parts, sites: Collection[str]) -> dict[str, ClassStatistics]:
        """Return for each site the merged statistics of all others, where another has any."""
        known = {site: part for site, part in parts.items() if part.count.sum() > 0}
        found = {site: [one for one in known.items() if one[0] != site] for site in sites}
        return {site: self.merged(rest) for site, rest in found.items() if rest}

    def _separate(self, parts: Parts) -> list[ClassStatistics]:
        """Return the sites' parts as they are merged, in an order that does not name the sites."""
        if ALL_SITES in parts:
            raise ValueError("parts: found a sum over the sites, expected the part of each site")
        ordered = [part for _, part in sorted_by_site(list(parts.items()))]
        kept = without_farthest(ordered, self.settings.trimmed)
        if self.settings.weighting == "sites":
            kept = [part.weighted_equally() for part in kept]
        return sorted(kept, key=ClassStatistics.digest)

    def without(self, parts: Parts, gone: Collection[str]) -> dict[str, ClassStatistics]:
        """Remove departed sites from a memory; one that mixes all sites is emptied."""
        if gone and ALL_SITES in parts:
            return {}
        return {site: part for site, part in parts.items() if site not in gone}

    def _moved(self, previous: Parts, fresh: Fresh) -> dict[str, ClassStatistics]:
        if not fresh:
            return dict(previous)
        merged = self.merged(fresh)
        if previous:
            merged = momentum_update(previous[ALL_SITES], merged, self.settings.momentum)
        return {ALL_SITES: merged}

    def shift(self, fresh: Fresh) -> dict[str, list[float]]:
        """Return the domain shift of a round's statistics, by class (NaN if no site has seen it).

        There is none of a secure sum, of which the sites' shares are unknown.

        Returns:
            `between_site_trace` and `within_site_trace`, (K,) each: the two parts of the trace of
            the pooled covariance.
        """
        if ALL_SITES in dict(fresh):
            return {}
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
    """Mix previous and fresh statistics with the weights 1 - beta and beta, regardless of counts.

    mean += beta d and covariance = (1-beta) S + beta S' + beta (1-beta) d d^T with d = fresh mean -
    mean. A class absent on one side is taken from the other.

    Returns:
        The mixture, with the fresh counts, or the previous ones where the fresh ones are zero.
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
    """Return the round's rows on prototypes (phase `merge`).

    They are the domain shift, count, distance to the nearest other class and condition number of
    every class, the distance of every two sites' class (`pair_distance`), and its mean over the
    other sites (`site_distance`).

    Args:
        memory: The policy.
        prototypes: Prototypes after the round.
        fresh: (site, statistics) of the round's admitted payloads.
        classes: K class names.
        number: Number of the round.
    """
    figures = {
        "prototype_count": prototypes.count.tolist(),
        "prototype_distance": prototypes.nearest_distance().tolist(),
        "prototype_condition": prototypes.condition_number().tolist(),
    } | (memory.shift(fresh) if fresh else {})
    return _class_rows(figures, classes, number) + _distance_rows(fresh, classes, number)


def _distance_rows(fresh: Fresh, classes: Sequence[str], number: int) -> list[dict[str, Any]]:
    """Return how far the sites are from each other, by class; nothing with fewer than two sites.

    It needs the statistics of single sites, which are not known from a sum over sites.
    """
    if len(fresh) < 2:
        return []
    parts = sorted(fresh, key=lambda part: part[0])
    sites = [site for site, _ in parts]
    distances = class_distances([part for _, part in parts])
    means = mean_distance_to_others(distances)
    rows = [
        row | {"site": site}
        for site, column in zip(sites, means.T, strict=True)
        for row in _class_rows({"site_distance": column.tolist()}, classes, number)
    ]
    return rows + [
        row | {"site": sites[one], "other": sites[other]}
        for one, other in combinations(range(len(sites)), 2)
        for row in _class_rows(
            {"pair_distance": distances[:, one, other].tolist()}, classes, number
        )
    ]


def shift_rows(
    memory: PrototypeMemory, fresh: Fresh, classes: Sequence[str], number: int
) -> list[dict[str, Any]]:
    """Return the rows on the domain shift of the selected model in evaluation mode."""
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
