"""Screens of the models of a round: size, direction, free riders and copies.

An update is a site's model minus the model that it received, without BatchNorm's running moments.

| code | found |
| --- | --- |
| PAY-116 | the model of another site up to `COPY`, or one of an earlier round |
| PAY-115 | the received model, or an update below `LEAST_FACTOR` of the others' |
| PAY-113 | an update above `SIZE_FACTOR` times the others', or the same against its first rounds |
| PAY-114 | updates against the direction that the others share, since the first round |

Sites may take different numbers of steps: a size is compared per step where that favours the site.
The direction is the mean over the first rounds of the run and the present one. Later rounds alone
prove nothing: near the optimum of their mean the updates of honest sites with different images
cancel, so that one of them points away from the others (measured on real prostate images,
docs/explanation/reliability.md). Pure NumPy. Legend: S sites, P learnable weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedsgcg.common.wire.norm_moments import MEAN, VARIANCE
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.screening.history import WARMUP, History
from fedsgcg.server.screening.scores import OTHERS, Array, Finding, is_excessive

SIZE_FACTOR: Final = 10.0
"""Factor by which an update must exceed the median of the others."""

LEAST_FACTOR: Final = 1e-3
"""Share of the others' median below which an update is none."""

ROUND_OFF: Final = 1e-6
"""Norm of an update, relative to the model's, that float32 round-off may cause."""

COPY: Final = 1e-3
"""Distance of two updates, relative to their norms, below which one is a copy of the other."""

LEAST_AGREEMENT: Final = 0.01
"""Least mean cosine among the other sites: below it they share no direction."""

CHANCE: Final = 5.0
"""Standard deviations by which their mean cosine must exceed that of random directions."""

AGAINST: Final = -0.5
"""Mean cosine to the others, relative to that among them, below which an update opposes them."""

BLOCK: Final = 1 << 18
"""Weights of each site held as float64 at a time."""


@dataclass(frozen=True)
class Model:
    """One site's model of a round.

    Attributes:
        site: The site.
        weights: Its model.
        steps: Steps that it took, as far as the coordinator can know; only ratios matter.
        examples: Training slices that it stated.
    """

    site: str
    weights: Weights
    steps: float = 1.0
    examples: float = 1.0


@dataclass(frozen=True)
class Updates:
    """Inner products of the sites' updates.

    Attributes:
        sites: (S,) names.
        gram: (S, S) inner products.
        model: Norm of the received model.
        size: P, number of learnable weights.
        steps: (S,) steps of each site.
    """

    sites: tuple[str, ...]
    gram: Array
    model: float
    size: int
    steps: Array

    @classmethod
    def of(cls, models: Sequence[Model], reference: Weights) -> Updates:
        """Compute the inner products in float64, block by block; the sites' order is that given."""
        gram = np.zeros((len(models), len(models)))
        square, size = 0.0, 0
        for part in _learnable_blocks(reference):
            start = reference.values[part].astype(np.float64)
            moved = np.stack([model.weights.values[part] - start for model in models])
            gram += moved @ moved.T
            square += float(start @ start)
            size += start.size
        sites = tuple(model.site for model in models)
        steps = np.array([max(model.steps, 1.0) for model in models])
        return cls(sites, gram, math.sqrt(square), size, steps)

    @property
    def norms(self) -> Array:
        """(S,) norms of the updates."""
        return np.sqrt(np.diag(self.gram))

    def log_norms(self, site: int, others: Sequence[int]) -> tuple[float, list[float]]:
        """Logarithms of the norms of a site and of others, the site's per step if it took more."""
        floor = np.finfo(np.float64).tiny
        logs = np.log(np.maximum(self.norms, floor))
        more = self.steps[site] / float(np.median(self.steps[list(others)]))
        return float(logs[site] - math.log(max(more, 1.0))), [float(logs[k]) for k in others]

    def distance(self, site: int, other: int) -> float:
        """Norm of the difference of two updates, relative to the smaller of their norms."""
        square = self.gram[site, site] + self.gram[other, other] - 2 * self.gram[site, other]
        smaller = max(min(self.norms[site], self.norms[other]), np.finfo(np.float64).tiny)
        return math.sqrt(max(float(square), 0.0)) / float(smaller)

    def agreement(self, site: int, others: Sequence[int]) -> tuple[float, float]:
        """Mean cosine of a site to others, and the mean among the pairs of the others."""
        norms = np.maximum(self.norms, math.sqrt(np.finfo(np.float64).tiny))
        cosines = self.gram / np.outer(norms, norms)
        inner = cosines[np.ix_(others, others)]
        pairs = len(others) * (len(others) - 1)
        return float(cosines[site, others].mean()), float((inner.sum() - len(others)) / pairs)


def screen_models(
    models: Sequence[Model], reference: Weights, history: History
) -> tuple[list[Finding], History]:
    """Compare the models of a round with each other and with the sites' first rounds.

    Args:
        models: The models that are valid by themselves (`server.admission`).
        reference: The model that the sites received.
        history: What is known from earlier rounds.

    Returns:
        At most one finding per site, and the history with the figures of the others.
    """
    ordered = sorted(models, key=lambda model: model.site)
    digests = {model.site: model.weights.digest() for model in ordered}
    updates = Updates.of(ordered, reference)
    found = {finding.site: finding for finding in _repeated(digests, reference, history)}
    found |= {finding.site: finding for finding in _unmoved(updates, frozenset(found))}
    found |= {finding.site: finding for finding in _copied(ordered, updates, frozenset(found))}
    for screen in (_oversized, _undersized):
        found |= {one.site: one for one in screen(updates, history, frozenset(found))}
    opposed = {one.site: one for one in _opposed(updates, history, frozenset(found))}
    history = _with_directions(updates, frozenset(found), history)
    found |= opposed
    history = _with_sizes(updates, frozenset(found), history)
    kept = {site: digest for site, digest in digests.items() if site not in found}
    return [found[site] for site in sorted(found)], history.with_models(reference.digest(), kept)


def _repeated(
    digests: Mapping[str, str], reference: Weights, history: History
) -> Iterator[Finding]:
    earlier = {digest for known in history.sites.values() for digest in known.digests}
    earlier = (earlier | set(history.models)) - {reference.digest()}
    for site, digest in sorted(digests.items()):
        if digest in earlier:
            yield Finding(site, "PAY-116", "a model of an earlier round")


def _copied(models: Sequence[Model], updates: Updates, out: Collection[str]) -> Iterator[Finding]:
    """A model counts once: that with the fewest examples, as nobody knows whose the original is."""
    moved = updates.norms > ROUND_OFF * updates.model
    left = [k for k, site in enumerate(updates.sites) if site not in out and moved[k]]
    kept: list[int] = []
    for k in sorted(left, key=lambda k: (models[k].examples, models[k].site)):
        if same := [other for other in kept if updates.distance(k, other) <= COPY]:
            detail = f"the model of {updates.sites[same[0]]} as well"
            yield Finding(updates.sites[k], "PAY-116", detail, counts=False)
        else:
            kept.append(k)


def _unmoved(updates: Updates, out: Collection[str]) -> Iterator[Finding]:
    still = updates.norms <= ROUND_OFF * updates.model
    if still.all():  # nobody trained: a matter of the settings, not of a site
        return
    for k in np.flatnonzero(still):
        if updates.sites[k] not in out:
            detail = f"an update of norm {updates.norms[k]:.2g}, that of the model is "
            yield Finding(updates.sites[k], "PAY-115", detail + f"{updates.model:.3g}")


def _oversized(updates: Updates, history: History, out: Collection[str]) -> Iterator[Finding]:
    for k, others in _compared(updates, out, fewest=1):
        value, logs = updates.log_norms(k, others)
        site, ratio = updates.sites[k], math.exp(min(value - float(np.median(logs)), 700.0))
        detail = f"an update {ratio:.3g} times as large as the median of the others"
        enough = len(others) >= OTHERS
        if enough and is_excessive(value, logs, SIZE_FACTOR):
            yield Finding(site, "PAY-113", detail)
        elif not enough and ratio > SIZE_FACTOR and updates.norms[k] > updates.model:
            yield Finding(site, "PAY-113", f"{detail}, and larger than the model")
        elif _has_jumped(updates, k, others, history):
            yield Finding(site, "PAY-113", f"{detail}, and far larger than in its first rounds")


def _has_jumped(updates: Updates, k: int, others: Sequence[int], history: History) -> bool:
    """Whether an update outgrew the site's first ones, both by itself and relative to the others.

    The first alone may come from a setting that changes for all sites, the second from another
    site whose update became small.
    """
    first = history.of(updates.sites[k]).sizes
    if len(first) < WARMUP:
        return False
    return all(
        is_excessive(value, [entry[column] for entry in first], SIZE_FACTOR)
        for column, value in enumerate(_size(updates, k, others))
    )


def _size(updates: Updates, k: int, others: Sequence[int]) -> tuple[float, float]:
    value, logs = updates.log_norms(k, others)
    return value, value - float(np.median(logs))


def _undersized(updates: Updates, history: History, out: Collection[str]) -> Iterator[Finding]:
    del history
    norms = updates.norms
    for k, others in _compared(updates, out):
        fewer = updates.steps[k] / float(np.median(updates.steps[others]))
        middle = float(np.median(norms[others]))
        if middle > ROUND_OFF * updates.model and (
            (share := norms[k] / middle) < LEAST_FACTOR * min(fewer, 1.0)
        ):
            detail = f"an update {share:.2g} times as large as the median of the others"
            yield Finding(updates.sites[k], "PAY-115", detail)


def _opposed(updates: Updates, history: History, out: Collection[str]) -> Iterator[Finding]:
    for k, others in _compared(updates, out):
        first = history.of(updates.sites[k]).directions
        if not (first or _is_beginning(history)):
            continue
        figures = np.array([*first, updates.agreement(k, others)])
        own, shared = figures.mean(axis=0)
        # Cosines of random directions are independent, with a standard deviation of 1 / sqrt(P).
        cosines = len(figures) * math.comb(len(others), 2)
        chance = CHANCE / math.sqrt(updates.size * cosines)
        if shared > max(LEAST_AGREEMENT, chance) and own < AGAINST * shared:
            detail = f"a mean cosine of {own:.2f} to the other sites, {shared:.2f} among them"
            yield Finding(updates.sites[k], "PAY-114", detail)


def _is_beginning(history: History) -> bool:
    return len(history.models) < WARMUP


def _compared(
    updates: Updates, out: Collection[str], fewest: int = OTHERS
) -> Iterator[tuple[int, list[int]]]:
    """Each site that is not out, with the others that are not out if they are enough."""
    left = [k for k, site in enumerate(updates.sites) if site not in out]
    if len(left) > fewest:
        yield from ((k, [other for other in left if other != k]) for k in left)


def _with_sizes(updates: Updates, out: Collection[str], history: History) -> History:
    pairs = _compared(updates, out, fewest=1)
    return history.with_first(
        "sizes", {updates.sites[k]: _size(updates, k, others) for k, others in pairs}
    )


def _with_directions(updates: Updates, out: Collection[str], history: History) -> History:
    """Remember the directions of the first rounds, also of sites that are against the others."""
    if not _is_beginning(history):
        return history
    pairs = _compared(updates, out)
    return history.with_first(
        "directions", {updates.sites[k]: updates.agreement(k, others) for k, others in pairs}
    )


def _learnable_blocks(weights: Weights) -> Iterator[slice]:
    """Slices of the flat array with learnable weights, at most `BLOCK` long."""
    start = 0
    for name, shape in weights.layout:
        stop = start + math.prod(shape)
        if not name.endswith((MEAN, VARIANCE)):
            yield from (slice(at, min(at + BLOCK, stop)) for at in range(start, stop, BLOCK))
        start = stop
