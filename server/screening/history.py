"""What is remembered about each site: its first accepted rounds, its rejections and its pauses.

The history is part of the checkpoint, so that a resumed run judges exactly like an uninterrupted
one. Pure Python.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

WARMUP: Final = 3
"""Accepted rounds of a site that are remembered for comparison. They are its first ones and never
replaced: a site that changes slowly is compared with its beginning, not with its last round."""

REJECTIONS: Final = 3
"""Consecutive rejections that pause a site."""

PAUSE_ROUNDS: Final = 3
"""Rounds for which a site is paused. Afterwards one more rejection pauses it again."""

VOID_ROUNDS: Final = 3
"""Consecutive rounds without an admitted model that stop the run."""

REMEMBERED: Final = 50
"""Models of earlier rounds, by site and of the coordinator, whose hashes are remembered."""

Figures = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SiteHistory:
    """What is remembered about one site; figures are those of its first `WARMUP` accepted rounds.

    Attributes:
        sizes: (logarithm of the update's norm, the same relative to the other sites).
        directions: (mean cosine to the other sites' updates, mean cosine among those), of the first
            rounds of the run, whether accepted or not.
        shifts: Distance of each class mean from those of the other sites, NaN if unknown.
        digests: Hashes of its last admitted models.
        rejections: Rejections in a row, in rounds.
        paused_until: Last round for which it is paused, 0 if it was never.
    """

    sizes: Figures = ()
    directions: Figures = ()
    shifts: Figures = ()
    digests: tuple[str, ...] = ()
    rejections: int = 0
    paused_until: int = 0


@dataclass(frozen=True)
class History:
    """What is remembered about a federation.

    Attributes:
        sites: History of each site.
        models: Hashes of the last models that the coordinator sent.
        void_rounds: Rounds in a row in which no model was admitted.
    """

    sites: Mapping[str, SiteHistory] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    void_rounds: int = 0

    def of(self, site: str) -> SiteHistory:
        """Return the history of a site, an empty one if nothing is known."""
        return self.sites.get(site, SiteHistory())

    def changed(self, site: str, **changes: Any) -> History:
        """Return this history with some attributes of one site replaced."""
        return replace(self, sites={**self.sites, site: replace(self.of(site), **changes)})

    def with_first(self, name: str, figures: Mapping[str, tuple[float, ...]]) -> History:
        """Return this history with figures of accepted sites added to their first rounds.

        Args:
            name: `sizes`, `directions` or `shifts`.
            figures: Site -> figures of the round.
        """
        history = self
        for site, found in figures.items():
            known: Figures = getattr(self.of(site), name)
            if len(known) < WARMUP:
                history = history.changed(site, **{name: (*known, found)})
        return history

    def with_models(self, sent: str, admitted: Mapping[str, str]) -> History:
        """Return this history with the hashes of a round's models: sent, and admitted by site."""
        history = replace(self, models=_last((*self.models, sent)))
        for site, digest in admitted.items():
            history = history.changed(site, digests=_last((*self.of(site).digests, digest)))
        return history

    def counted(
        self, number: int, accepted: Iterable[str], rejected: Iterable[str], may_pause: int
    ) -> tuple[History, list[str]]:
        """Count the rejections of a round, and pause sites that were rejected too often in a row.

        Args:
            number: Number of the round.
            accepted: Sites whose answers were all admitted; their count restarts.
            rejected: Sites with a rejected answer.
            may_pause: Most sites that may be paused, so that enough are left.

        Returns:
            The history, and the sites paused from the next round on, in the order of their names.
        """
        history = self
        for site in accepted:
            history = history.changed(site, rejections=0)
        paused: list[str] = []
        for site in sorted(rejected):
            count = history.of(site).rejections + 1
            history = history.changed(site, rejections=count)
            if count >= REJECTIONS and len(paused) < may_pause:
                paused.append(site)
                until = number + PAUSE_ROUNDS
                history = history.changed(site, rejections=REJECTIONS - 1, paused_until=until)
        return history, paused

    def paused(self, number: int) -> dict[str, int]:
        """Return the sites that are paused in a round -> last round of their pause."""
        return {
            site: known.paused_until
            for site, known in sorted(self.sites.items())
            if known.paused_until >= number
        }

    def without(self, gone: Collection[str]) -> History:
        """Return this history without departed sites; hashes of their models are kept."""
        digests = tuple(digest for site in sorted(gone) for digest in self.of(site).digests)
        sites = {site: known for site, known in self.sites.items() if site not in gone}
        return replace(self, sites=sites, models=_last((*self.models, *digests)))

    def to_tree(self) -> dict[str, Any]:
        """Return the history as JSON types."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> History:
        """Read the result of `to_tree`; an empty mapping gives an empty history."""
        sites = {
            str(site): SiteHistory(**{name: _tuples(value) for name, value in dict(known).items()})
            for site, known in dict(tree.get("sites", {})).items()
        }
        return cls(sites, _tuples(tree.get("models", ())), int(tree.get("void_rounds", 0)))


def _last(digests: tuple[str, ...]) -> tuple[str, ...]:
    return digests[-REMEMBERED:]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
