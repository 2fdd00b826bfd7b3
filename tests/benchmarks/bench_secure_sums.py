"""Cost of a secure sum of a model and its class statistics: seconds and bytes per step.

Every step of every site runs in this process on one core, without training and without a link.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from fedsgcg.common.secure_sums.contribution import Contribution, Scheme
from fedsgcg.common.secure_sums.keys import SiteKey, text_of
from fedsgcg.common.secure_sums.opening import Opening
from fedsgcg.common.secure_sums.party import Party
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Weights
from tests.benchmarks.harness import one_thread, row, show

SITES = (4, 16, 64)
WEIGHTS = 3_190_130
CLASSES, FEATURES = 2, 32
PART = "secure_sums"
SESSION = "session of the benchmark"
SAMPLE = 2
"""Sites whose masking is measured."""


@dataclass
class Clock:
    """Seconds of processor time by who spent them."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def timed(self, who: str, work: Callable[[], Any]) -> Any:
        """Run some work and count its time."""
        start = time.process_time()
        result = work()
        self.seconds[who] += time.process_time() - start
        return result


def run() -> list[dict[str, Any]]:
    """Measure every number of sites and return the rows."""
    with one_thread():
        return show([line for sites in SITES for lost in (0, 1) for line in measured(sites, lost)])


def measured(sites: int, lost: int, weights: int = WEIGHTS) -> list[dict[str, Any]]:
    """Run one sum, in which some sites drop out after they have masked their numbers.

    All sites take every step but the masking, which `SAMPLE` of them take; their masked numbers
    stand for those of the others, so that the total is not read.
    """
    scheme, own = inputs(sites, weights)
    parties = {name: party(name) for name in (f"site {k:02}" for k in range(sites))}
    opening, clock = Opening(SESSION, scheme.size), Clock()
    up = 0
    for name, one in parties.items():
        keys = clock.timed("site", one.advertise)
        up += len(json.dumps(keys.to_tree()))
        clock.timed("coordinator", partial(opening.add_keys, name, keys))
    for name, one in parties.items():
        shares = clock.timed("site", partial(one.share, opening.keys))
        up += len(json.dumps({site: text_of(share) for site, share in shares.items()}))
        clock.timed("coordinator", partial(opening.add_shares, name, shares))
    sharing, words = list(parties), np.zeros(0, np.uint64)
    for number, (name, one) in enumerate(parties.items()):
        if number < SAMPLE:
            words = clock.timed("masking", lambda o=one: o.mask(scheme.encode(own), sharing))
        else:
            one.mask(np.zeros(0, np.uint64), sharing)
        if number < sites - lost:
            up += words.nbytes
            clock.timed("coordinator", partial(opening.add_masked, name, words))
    for name in opening.contributors:
        sign = clock.timed("site", partial(parties[name].agree, opening.contributors, "r"))
        clock.timed("coordinator", partial(opening.add_signature, name, sign, "r"))
    for name in opening.contributors:
        received = opening.shares_for(name)
        opened = clock.timed("site", partial(parties[name].open, opening.signatures, received))
        up += len(json.dumps({site: text_of(share) for site, share in opened.items()}))
        clock.timed("coordinator", partial(opening.add_opened, name, opened))
    clock.timed("coordinator", opening.result)
    total = np.zeros(scheme.size, np.uint64)
    total[0] = 2**40  # a weight, so that the mean is defined
    clock.timed("coordinator", partial(scheme.decode, total, len(opening.contributors)))
    case = f"{sites} sites, {lost} drop out"
    one_site = clock.seconds["site"] / sites + clock.seconds["masking"] / min(SAMPLE, sites)
    return [
        row(PART, case, "one site", one_site, "s"),
        row(PART, case, "coordinator", clock.seconds["coordinator"], "s"),
        row(PART, case, "sent by one site", up / sites / 1e6, "MB"),
        row(PART, case, "of the plain model", up / sites / (4 * weights), "x"),
    ]


def inputs(sites: int, weights: int) -> tuple[Scheme, Contribution]:
    """The blocks of a sum, and one site's numbers."""
    rng = np.random.default_rng(0)
    received = Weights((("w", (weights,)),), rng.normal(size=weights).astype(np.float32))
    scheme = Scheme(sites, 1024.0, 2.0**30, weights=received, shape=(CLASSES, FEATURES))
    features = rng.normal(size=(500, FEATURES))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = rng.integers(0, CLASSES, 500)
    statistics = ClassStatistics.from_features(features, labels, CLASSES)
    trained = Weights(received.layout, (received.values * 1.01).astype(np.float32))
    return scheme, Contribution(trained, statistics, metrics={"examples": 100.0, "loss": 1.0})


def party(name: str) -> Party:
    """A site with a simulated identity."""
    return Party(name, SESSION, SiteKey.simulated(name))
