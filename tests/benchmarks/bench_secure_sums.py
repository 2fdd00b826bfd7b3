"""Cost of a secure sum of a model and its class statistics: seconds and bytes per step.

Every step of every site runs in this process on one core, without training and without a link.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
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


def run() -> list[dict[str, Any]]:
    """Measure every number of sites and return the rows."""
    with one_thread():
        return show([line for sites in SITES for lost in (0, 1) for line in measured(sites, lost)])


def measured(sites: int, lost: int, weights: int = WEIGHTS) -> list[dict[str, Any]]:
    """Run one sum, in which some sites drop out after they have masked their numbers."""
    rng = np.random.default_rng(0)
    received = Weights((("w", (weights,)),), rng.normal(size=weights).astype(np.float32))
    scheme = Scheme(sites, 1024.0, 2.0**30, weights=received, shape=(CLASSES, FEATURES))
    features = rng.normal(size=(500, FEATURES))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    statistics = ClassStatistics.from_features(features, rng.integers(0, CLASSES, 500), CLASSES)
    trained = Weights(received.layout, (received.values * 1.01).astype(np.float32))
    own = Contribution(trained, statistics, metrics={"examples": 100.0, "loss": 1.0})
    parties = {f"site {k:02}": party(k) for k in range(sites)}
    opening, seconds = Opening("benchmark session", scheme.size), {"site": 0.0, "coordinator": 0.0}

    def timed(who: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds[who] += time.process_time() - start
        return result

    up = 0
    for name, one in parties.items():
        keys = timed("site", one.advertise)
        up += len(json.dumps(keys.to_tree()))
        timed("coordinator", lambda n=name, k=keys: opening.add_keys(n, k))
    for name, one in parties.items():
        shares = timed("site", lambda o=one: o.share(opening.keys))
        up += len(json.dumps({site: text_of(share) for site, share in shares.items()}))
        timed("coordinator", lambda n=name, s=shares: opening.add_shares(n, s))
    sharing = list(parties)
    for name, one in list(parties.items())[: sites - lost]:
        words = timed("site", lambda o=one: o.mask(scheme.encode(own), sharing))
        up += words.nbytes
        timed("coordinator", lambda n=name, w=words: opening.add_masked(n, w))
    for name in opening.contributors:
        sign = timed("site", lambda n=name: parties[n].agree(opening.contributors, "r"))
        timed("coordinator", lambda n=name, s=sign: opening.add_signature(n, s, "r"))
    for name in opening.contributors:
        shares = opening.shares_for(name)
        opened = timed("site", lambda n=name, s=shares: parties[n].open(opening.signatures, s))
        up += len(json.dumps({site: text_of(share) for site, share in opened.items()}))
        timed("coordinator", lambda n=name, o=opened: opening.add_opened(n, o))
    timed("coordinator", lambda: scheme.decode(opening.result(), len(opening.contributors)))
    case = f"{sites} sites, {lost} drop out"
    plain = 4 * weights
    return [
        row(PART, case, "one site", seconds["site"] / sites, "s"),
        row(PART, case, "coordinator", seconds["coordinator"], "s"),
        row(PART, case, "sent by one site", up / sites / 1e6, "MB"),
        row(PART, case, "of the plain model", up / sites / plain, "x"),
    ]


def party(number: int) -> Party:
    """A site with a simulated identity."""
    name = f"site {number:02}"
    return Party(name, "benchmark session", SiteKey.simulated(name))
