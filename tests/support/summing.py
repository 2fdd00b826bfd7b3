"""A secure sum between objects in memory, in which sites drop out where a test wants it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedsgcg.common.secure_sums.fixed_point import Words
from fedsgcg.common.secure_sums.keys import SiteKey
from fedsgcg.common.secure_sums.opening import Opening
from fedsgcg.common.secure_sums.party import Party

STEPS = ("keys", "shares", "answers", "check", "open")
SESSION = "0123456789abcdef"


@dataclass
class Transcript:
    """A sum and everything that the coordinator receives.

    Attributes:
        opening: The coordinator's side.
        parties: The sites.
        seen: What arrived at the coordinator, as bytes.
    """

    opening: Opening
    parties: dict[str, Party]
    seen: list[bytes] = field(default_factory=list)


def parties_of(
    names: Collection[str], session: str = SESSION, minimum: int = 3
) -> dict[str, Party]:
    """Sites with simulated identities."""
    return {name: Party(name, session, SiteKey.simulated(name), minimum) for name in names}


def run_sum(
    numbers: Mapping[str, Words],
    gone: Mapping[str, str] | None = None,
    session: str = SESSION,
    minimum: int = 3,
) -> Transcript:
    """Run a sum until the coordinator has what it needs for the result.

    Args:
        numbers: Integers of each site.
        gone: Site -> the first step (`STEPS`) that it does not answer.
        session: Identifier of the sum.
        minimum: Fewest sites.
    """
    gone = gone or {}
    size = next(iter(numbers.values())).size
    parties = parties_of(numbers, session, minimum)
    found = Transcript(Opening(session, size, minimum), parties)
    opening = found.opening

    def there(site: str, step: str) -> bool:
        return site not in gone or STEPS.index(step) < STEPS.index(gone[site])

    for site, party in parties.items():
        if there(site, "keys"):
            opening.add_keys(site, party.advertise())
    opening.require(len(opening.keys))
    for site in list(opening.keys):
        if there(site, "shares"):
            shares = parties[site].share(opening.keys)
            found.seen += shares.values()
            opening.add_shares(site, shares)
    opening.require(len(opening.shares))
    for site in list(opening.shares):
        # The site has masked its numbers even if they never arrive.
        words = parties[site].mask(numbers[site].copy(), list(opening.shares))
        if there(site, "answers"):
            found.seen.append(words.tobytes())
            opening.add_masked(site, words)
    opening.require(len(opening.contributors))
    for site in list(opening.contributors):
        if there(site, "check"):
            signature = parties[site].agree(opening.contributors, "reference")
            opening.add_signature(site, signature, "reference")
    opening.require(len(opening.signatures))
    for site in list(opening.signatures):
        if there(site, "open"):
            opened = parties[site].open(opening.signatures, opening.shares_for(site))
            found.seen += opened.values()
            opening.add_opened(site, opened)
    return found
