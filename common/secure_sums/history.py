"""Sums that were opened, so that no combination of them isolates a few sites.

Two sums of the same numbers whose contributors differ by one site give that site's numbers. Sites
that appear in the same sums cannot be told apart by any weighted sum of them; if every such group
has at least as many sites as a sum must have, so has everything that can be computed from the sums.
Sums are of the same numbers if the request was the same: the model that was sent, the prototypes,
and what was asked for. The number of the round and the name of the run are left out, because what a
site computes for the same model differs little or not at all between rounds, folds and runs.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fedsgcg.common.errors import FedsgcgError, fail

Sites = frozenset[str]


def reference_of(kind: str, model: str, prototypes: str, options: Mapping[str, Any]) -> str:
    """Return the digest of what a sum is about.

    Args:
        kind: Type of the request.
        model: Digest of the model.
        prototypes: Digest of the common reference of the statistics, "" without one.
        options: Options of the request that decide what a site computes.
    """
    text = json.dumps([kind, model, prototypes, dict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def smallest_group(sums: Iterable[Sites]) -> int:
    """Return the number of sites of the smallest group that appears in the same sums."""
    found = list(sums)
    patterns = Counter(tuple(site in each for each in found) for site in frozenset().union(*found))
    return min(patterns.values(), default=0)


def check_sums(earlier: Iterable[Collection[str]], new: Collection[str], fewest: int) -> None:
    """Refuse a sum that isolates, with earlier ones of the same reference, fewer sites.

    Raises:
        FedsgcgError: PRV-954.
    """
    sums = [*map(frozenset, earlier), frozenset(new)]
    if (found := smallest_group(sums)) < fewest:
        raise isolates(found, fewest)


def isolates(found: int, fewest: int) -> FedsgcgError:
    """Return PRV-954 for sums that isolate too few sites."""
    return fail(
        "PRV-954",
        found=f"sums of the same model whose difference covers {found} "
        f"site{'' if found == 1 else 's'}",
        expected=f"{fewest} or more",
        action="wait until the sites of the earlier sum are back; give each fold and study of the "
        "same hospitals a seed of its own",
    )
