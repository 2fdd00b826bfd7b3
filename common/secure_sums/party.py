"""A site's side of one secure sum, as a state machine without a transport.

The steps are those of Bonawitz et al. 2017, figure 4: `advertise`, `share`, `mask`, `agree`,
`open`. Each can be taken once and in this order. A site gives, for every other site, a share of
either its mask key (if it dropped out) or its self-mask (if it contributed), never of both: both
together would open its input.

Legend: U1, U2, U3 the sites that announced keys, that sent shares, and that contributed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.secure_sums import shamir
from fedsgcg.common.secure_sums.fixed_point import Words
from fedsgcg.common.secure_sums.keys import SiteKey, SumKeys, bytes_of, is_signed, text_of
from fedsgcg.common.secure_sums.masks import (
    KEY_BYTES,
    add_mask,
    agreed_key,
    derived_key,
    public_bytes,
    sealed,
    unsealed,
)

FEWEST: Final = 3
"""Fewest sites of a sum: of two, each knows the other's part."""

STEPS: Final = ("new", "advertised", "shared", "masked", "agreed", "opened")


def threshold_of(sites: int, minimum: int = FEWEST) -> int:
    """Return how many sites must take part until the end: more than two thirds, and the minimum.

    Fewer than a third of the sites that cooperate with a coordinator that shows different sites
    different lists cannot make the others open both secrets of a site.
    """
    return max(minimum, 2 * sites // 3 + 1)


def agreement(session: str, contributors: Collection[str], reference: str) -> bytes:
    """Return the bytes that every site signs: whose sum is opened, and of what."""
    fields = ["fedsgcg contributors of a secure sum", session, sorted(contributors), reference]
    return json.dumps(fields).encode()


def self_mask_key(seed: bytes, session: str, site: str) -> bytes:
    """Return the key of a site's own mask."""
    return derived_key(seed, "self-mask", session, site)


def pair_key(private: bytes, public: bytes, session: str, site: str, other: str) -> bytes:
    """Return the key of the mask of two sites."""
    return agreed_key(private, public, "pairwise mask", session, site, other)


@dataclass
class Party:
    """One site in one sum.

    Args:
        site: Its name.
        session: Identifier of the sum, chosen by the coordinator.
        key: The site's identity.
        minimum: Fewest sites of a sum in which it takes part, at least `FEWEST`.

    Attributes:
        step: The last step taken (`STEPS`).
        secret_cipher: X25519 private key for the encryption of shares.
        secret_mask: X25519 private key for the masks.
        seed: Secret of the self-mask.
        keys: Keys of the sites of U1.
        own_shares: Its own shares of its own two secrets.
        sharing: U2.
        contributors: U3.
        reference: Digest of what is summed.
    """

    site: str
    session: str
    key: SiteKey
    minimum: int = FEWEST
    step: str = "new"
    secret_cipher: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    secret_mask: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    keys: dict[str, SumKeys] = field(default_factory=dict)
    own_shares: tuple[bytes, bytes] = (b"", b"")
    sharing: tuple[str, ...] = ()
    contributors: tuple[str, ...] = ()
    reference: str = ""

    def __post_init__(self) -> None:
        self.minimum = max(self.minimum, FEWEST)

    @property
    def threshold(self) -> int:
        """Sites that must take part until the end."""
        return threshold_of(len(self.keys), self.minimum)

    def advertise(self) -> SumKeys:
        """Return the fresh keys of this sum, signed by the site's identity."""
        self._take("new", "advertised")
        cipher, mask = public_bytes(self.secret_cipher), public_bytes(self.secret_mask)
        content = SumKeys.content(self.session, self.site, cipher, mask)
        return SumKeys(cipher, mask, self.key.public, self.key.sign(content))

    def share(self, keys: Mapping[str, SumKeys]) -> dict[str, bytes]:
        """Return the shares of both secrets, encrypted for each other site of U1.

        Raises:
            FedsgcgError: PRV-953 for too few sites; PRV-955 for keys that a site has not signed for
                this sum, that two sites have in common, or that are not this site's own; PRV-959
                out of turn.
        """
        self._expect("advertised")
        self._check_number(keys)
        for site, theirs in keys.items():
            theirs.check(self.session, site)
        for name in ("cipher", "mask", "identity"):
            if len({getattr(theirs, name) for theirs in keys.values()}) < len(keys):
                raise fail("PRV-955", found=f"two sites with the same {name} key")
        own = keys.get(self.site)
        if own is None or own.mask != public_bytes(self.secret_mask):
            raise fail("PRV-955", where=self.site, found="keys that are not this site's own")
        self.keys = dict(sorted(keys.items()))
        shares = {
            site: pair
            for site, *pair in zip(
                self.keys,
                shamir.split(self.secret_mask, self.threshold, len(keys)),
                shamir.split(self.seed, self.threshold, len(keys)),
                strict=True,
            )
        }
        mask, seed = shares.pop(self.site)
        self.own_shares = (mask, seed)
        self._take("advertised", "shared")
        return {
            other: sealed(self._cipher_key(self.site, other), b"".join(pair))
            for other, pair in shares.items()
        }

    def mask(self, words: Words, sharing: Collection[str]) -> Words:
        """Return the site's numbers with the self-mask and the masks of all pairs.

        Args:
            words: (N,) integers of `fixed_point.encode`; changed in place.
            sharing: U2.

        Raises:
            FedsgcgError: PRV-953 for too few sites, PRV-956 for a site without keys, PRV-959 out of
                turn.
        """
        self._expect("shared")
        self._check_members(sharing, self.keys)
        self.sharing = tuple(sorted(sharing))
        self._take("shared", "masked")
        add_mask(words, self_mask_key(self.seed, self.session, self.site))
        for other in self.sharing:
            if other != self.site:
                key = pair_key(
                    self.secret_mask, self.keys[other].mask, self.session, self.site, other
                )
                add_mask(words, key, subtract=other < self.site)
        return words

    def agree(self, contributors: Collection[str], reference: str) -> bytes:
        """Sign whose numbers are summed, and what they are.

        Args:
            contributors: U3.
            reference: Digest of the request that this site answered.

        Raises:
            FedsgcgError: PRV-953 for too few sites, PRV-956 for a site that sent no shares, PRV-959
                out of turn.
        """
        self._expect("masked")
        self._check_members(contributors, self.sharing)
        self.contributors, self.reference = tuple(sorted(contributors)), reference
        self._take("masked", "agreed")
        return self.key.sign(agreement(self.session, self.contributors, reference))

    def open(
        self, signatures: Mapping[str, bytes], shares: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """Return one share for each site of U2: of its self-mask if it contributed, else its key.

        Args:
            signatures: What the sites returned from `agree`.
            shares: What the other sites of U2 returned from `share` for this site.

        Raises:
            FedsgcgError: PRV-958 for sites that signed another list or another reference; PRV-953
                for too few signatures; PRV-956 for a share of a stranger; PRV-959 out of turn.
        """
        self._expect("agreed")
        content = agreement(self.session, self.contributors, self.reference)
        for site, signature in signatures.items():
            known = site in self.contributors
            if not known or not is_signed(content, signature, self.keys[site].identity):
                raise fail(
                    "PRV-958",
                    where=site,
                    found="a signature of other contributors or another reference",
                    expected="the same list and request at all sites",
                )
        self._check_number(signatures)
        others = {site for site in self.sharing if site != self.site}
        if strange := sorted(set(shares) ^ others):
            raise fail("PRV-956", found=f"shares of {', '.join(strange)} missing or not expected")
        opened = {}
        for site in self.sharing:
            mask, seed = self.own_shares if site == self.site else self._received(site, shares)
            opened[site] = seed if site in self.contributors else mask
        self._take("agreed", "opened")
        return opened

    def to_tree(self) -> dict[str, Any]:
        """Return the state as JSON; it holds the secrets of this sum."""
        return {
            "site": self.site,
            "session": self.session,
            "minimum": self.minimum,
            "step": self.step,
            "secrets": [text_of(one) for one in self._secrets()],
            "keys": {site: keys.to_tree() for site, keys in self.keys.items()},
            "sharing": list(self.sharing),
            "contributors": list(self.contributors),
            "reference": self.reference,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], key: SiteKey) -> Party:
        """Read `to_tree`; raises KeyError, TypeError, ValueError or PAY-106 for anything else."""
        cipher, mask, seed, *own = (bytes_of(text) for text in tree["secrets"])
        return cls(
            site=str(tree["site"]),
            session=str(tree["session"]),
            key=key,
            minimum=int(tree["minimum"]),
            step=STEPS[STEPS.index(tree["step"])],
            secret_cipher=cipher,
            secret_mask=mask,
            seed=seed,
            keys={site: SumKeys.from_tree(keys) for site, keys in tree["keys"].items()},
            own_shares=(own[0], own[1]),
            sharing=tuple(map(str, tree["sharing"])),
            contributors=tuple(map(str, tree["contributors"])),
            reference=str(tree["reference"]),
        )

    def _secrets(self) -> tuple[bytes, ...]:
        return (self.secret_cipher, self.secret_mask, self.seed, *self.own_shares)

    def _received(self, site: str, shares: Mapping[str, bytes]) -> tuple[bytes, bytes]:
        content = unsealed(self._cipher_key(site, self.site), shares[site], site)
        if len(content) != 2 * shamir.SHARE_BYTES:
            raise fail("PRV-956", where=site, found=f"a share of {len(content)} bytes")
        return content[: shamir.SHARE_BYTES], content[shamir.SHARE_BYTES :]

    def _cipher_key(self, sender: str, receiver: str) -> bytes:
        other = receiver if sender == self.site else sender
        purpose = json.dumps(["shares", sender, receiver])
        return agreed_key(
            self.secret_cipher, self.keys[other].cipher, purpose, self.session, sender, receiver
        )

    def _check_members(self, sites: Collection[str], known: Collection[str]) -> None:
        if strange := sorted(set(sites) - set(known)):
            raise fail("PRV-956", found=f"{', '.join(strange)}, unknown to this sum")
        if self.site not in sites:
            raise fail("PRV-956", found=f"a sum without {self.site}, which is asked to take part")
        self._check_number(sites)

    def _check_number(self, sites: Collection[str]) -> None:
        needed = self.threshold if self.keys else self.minimum
        if len(set(sites)) < needed:
            raise too_few(len(set(sites)), needed)

    def _expect(self, step: str) -> None:
        if self.step != step:
            raise fail(
                "PRV-959",
                where=self.site,
                found=f"a request after the step {self.step!r}",
                expected=f"the step {step!r}",
                action="a sum is computed once; the coordinator starts another one",
            )

    def _take(self, before: str, after: str) -> None:
        self._expect(before)
        self.step = after


def too_few(found: int, needed: int) -> FedsgcgError:
    """Return PRV-953 for a sum of too few sites."""
    return fail(
        "PRV-953",
        found=f"{found} sites",
        expected=f"{needed} or more",
        action="nothing is opened; wait for the missing hospitals, or train on more of them",
    )
