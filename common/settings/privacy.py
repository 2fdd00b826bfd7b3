"""Settings of what protects the patients in what a site sends: floors and secure sums."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsgcg.common.settings.base import Checks, Section, at_most

FEWEST_SITES = 3
"""Fewest sites of a secure sum: of two, each knows the other's part."""


@dataclass(frozen=True)
class SecureSumsSettings(Section):
    """Sums of the sites' weights and statistics of which the coordinator sees the total alone.

    See "Secure sums" in docs/explanation/privacy.md.

    Attributes:
        enabled: Whether the coordinator gets masked numbers, whose masks cancel in the sum of all
            sites, instead of each site's weights and statistics.
        fewest_sites: Fewest sites of a sum; at least three. A site's own file may demand more.
        update_norm: Longest update of a site (Euclidean norm of the change of its learnable
            weights); the site shortens a longer one, and the number of shortened updates is part
            of the sum. 0 = no bound.
        largest_change: Bound of the change of a single weight in a round. A site whose update has a
            larger one does not take part in the sum (PRV-957).
        largest_feature: Bound of a feature, where features do not have unit length.
        largest_activation: Bound of the mean and of the standard deviation of the input of a
            BatchNorm layer.
    """

    enabled: bool = False
    fewest_sites: int = at_most(1_000, FEWEST_SITES)
    update_norm: float = 0.0
    largest_change: float = at_most(1e9, 1024.0)
    largest_feature: float = at_most(1e6, 64.0)
    largest_activation: float = at_most(1e6, 1024.0)

    def checks(self) -> Checks:
        """Bounds are positive."""
        yield self.fewest_sites >= FEWEST_SITES, "fewest_sites", f"{FEWEST_SITES} or more"
        yield self.update_norm >= 0, "update_norm", "0 (no bound) or more"
        for name in ("largest_change", "largest_feature", "largest_activation"):
            yield getattr(self, name) > 0, name, "more than zero"


@dataclass(frozen=True)
class PrivacySettings(Section):
    """What a site withholds, and what protects the rest. A site's own file may only be stricter.

    Attributes:
        min_pixels: A class with fewer pixels at the site is withheld (sent as absent).
        min_patients: A class seen in fewer patients at the site is withheld.
        shrinkage: Whether the covariance of a class with no more patients P than features A is
            shrunk before it leaves, to P / (A + 1) of itself plus a multiple of the identity of the
            same trace: the means of so few patients span no more than P - 1 directions, which
            would be those of single patients.
        secure_sums: Settings of secure sums.
    """

    min_pixels: int = 1000
    min_patients: int = 2
    shrinkage: bool = False
    secure_sums: SecureSumsSettings = field(default_factory=SecureSumsSettings)

    def checks(self) -> Checks:
        """Floors are at least one."""
        yield self.min_pixels >= 1, "min_pixels", "1 or more"
        yield self.min_patients >= 1, "min_patients", "1 or more"
