"""The coordinator's side of one secure sum, as a state machine without a transport.

It passes keys and encrypted shares between the sites, adds the masked numbers as they arrive (none
is kept), and removes the masks of the total. Legend: U1 ... U3 as in `party`, N numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedsgcg.common.errors import fail
from fedsgcg.common.secure_sums import shamir
from fedsgcg.common.secure_sums.fixed_point import Words
from fedsgcg.common.secure_sums.keys import SumKeys, is_signed
from fedsgcg.common.secure_sums.masks import add_mask, public_bytes
from fedsgcg.common.secure_sums.party import (
    FEWEST,
    agreement,
    pair_key,
    self_mask_key,
    threshold_of,
    too_few,
)


@dataclass
class Opening:
    """One sum at the coordinator.

    Args:
        session: Identifier of the sum.
        size: N.
        minimum: Fewest sites of a sum, at least `FEWEST`.

    Attributes:
        keys: Keys by site (U1).
        shares: Encrypted shares by sender (U2) and receiver.
        contributors: Sites whose numbers are in the total (U3).
        total: (N,) sum of the masked numbers.
        signatures: The sites' signatures of the contributors.
        opened: Shares by the site that gave them and the site whose secret they are of.
    """

    session: str
    size: int
    minimum: int = FEWEST
    keys: dict[str, SumKeys] = field(default_factory=dict)
    shares: dict[str, dict[str, bytes]] = field(default_factory=dict)
    contributors: list[str] = field(default_factory=list)
    signatures: dict[str, bytes] = field(default_factory=dict)
    opened: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.minimum = max(self.minimum, FEWEST)
        self.total: Words = np.zeros(self.size, np.uint64)

    def resize(self, size: int) -> None:
        """Set N, before the first masked numbers."""
        if self.contributors:
            raise ValueError("the sum has numbers already")
        self.size, self.total = size, np.zeros(size, np.uint64)

    @property
    def threshold(self) -> int:
        """Sites that must take part in every step."""
        return threshold_of(len(self.keys), self.minimum)

    def add_keys(self, site: str, keys: SumKeys) -> None:
        """Take a site's keys; raises PRV-955 for keys that it has not signed for this sum."""
        keys.check(self.session, site)
        for name in ("cipher", "mask", "identity"):
            if getattr(keys, name) in {getattr(known, name) for known in self.keys.values()}:
                raise fail("PRV-955", where=site, found=f"the {name} key of another site")
        self.keys[site] = keys

    def add_shares(self, site: str, shares: Mapping[str, bytes]) -> None:
        """Take a site's encrypted shares; raises PRV-956 unless there is one for each other."""
        if set(shares) != set(self.keys) - {site}:
            raise fail("PRV-956", where=site, found=f"shares for {len(shares)} sites")
        self.shares[site] = dict(shares)

    def add_masked(self, site: str, words: Words) -> None:
        """Add a site's masked numbers (N,) to the total; raises PRV-956 for a site outside U2."""
        if site not in self.shares or site in self.contributors:
            raise fail("PRV-956", where=site, found="numbers of a site outside this sum")
        if words.shape != (self.size,) or words.dtype != np.uint64:
            raise fail(
                "PAY-103",
                where=site,
                found=f"{words.dtype} of shape {words.shape}",
                expected=f"uint64 of shape ({self.size},)",
            )
        np.add(self.total, words, out=self.total)
        self.contributors.append(site)

    def add_signature(self, site: str, signature: bytes, reference: str) -> None:
        """Take a site's signature of the contributors; raises PRV-958 for one of something else."""
        content = agreement(self.session, self.contributors, reference)
        known = site in self.contributors
        if not known or not is_signed(content, signature, self.keys[site].identity):
            raise fail("PRV-958", where=site, found="a signature of other contributors or numbers")
        self.signatures[site] = signature

    def shares_for(self, site: str) -> dict[str, bytes]:
        """Return the encrypted shares that the other sites of U2 made for a site."""
        return {sender: made[site] for sender, made in self.shares.items() if sender != site}

    def add_opened(self, site: str, shares: Mapping[str, bytes]) -> None:
        """Take the shares that a site gives of all sites of U2; raises PRV-956 for others."""
        right = set(shares) == set(self.shares)
        if not right or any(len(share) != shamir.SHARE_BYTES for share in shares.values()):
            raise fail("PRV-956", where=site, found=f"{len(shares)} shares")
        self.opened[site] = dict(shares)

    def require(self, number: int) -> None:
        """Raise PRV-953 when fewer sites than the threshold took the last step."""
        if number < self.threshold:
            raise too_few(number, self.threshold)

    def result(self) -> Words:
        """Return the sum (N,) of the contributors' numbers, without any mask.

        Raises:
            FedsgcgError: PRV-953 for too few shares, PRV-961 for shares that restore no secret.
        """
        self.require(len(self.opened))
        places = {site: number for number, site in enumerate(sorted(self.keys), start=1)}
        givers = sorted(self.opened)[: self.threshold]
        for site in sorted(self.shares):
            points = {places[giver]: self.opened[giver][site] for giver in givers}
            try:
                secret = shamir.join(points)
            except ValueError as error:
                raise fail("PRV-961", where=site, found="shares of several secrets") from error
            if site in self.contributors:
                add_mask(self.total, self_mask_key(secret, self.session, site), subtract=True)
            else:
                self._remove_pairs(site, secret)
        return self.total

    def _remove_pairs(self, gone: str, secret: bytes) -> None:
        """Remove the masks that the contributors made with a site that dropped out."""
        if public_bytes(secret) != self.keys[gone].mask:
            raise fail("PRV-961", where=gone, found="shares of another key than it announced")
        for site in self.contributors:
            key = pair_key(secret, self.keys[site].mask, self.session, gone, site)
            # The site subtracted the mask if the other's name comes first.
            add_mask(self.total, key, subtract=not gone < site)
