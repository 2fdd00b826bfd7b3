"""One accountant for everything that a site releases: epsilon of a list of Gaussian mechanisms.

Rényi differential privacy (Mironov 2017), composed over all releases by `dp-accounting`. The bound
holds for the discrete Gaussian as well, whose Rényi divergence is at most that of the continuous
one (Canonne, Kamath and Steinke 2020, theorem 4); tighter accountants are for the continuous one
only. Neighbouring data sets differ by adding or removing one patient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from fedsgcg.common.errors import fail

ORDERS: Final = (
    *(1.05, 1.1, 1.15, 1.2, 1.25, 1.5, 1.75, 2.25, 2.5, 3.5, 4.5),
    *range(2, 65),
    *(80, 96, 128, 192, 256, 512, 1024),
)
"""Orders of the Rényi divergences; the smallest epsilon over them counts."""

PATIENT: Final = "add or remove one patient"
SITE: Final = "add or remove one hospital"


@dataclass(frozen=True)
class Spending:
    """Releases of one Gaussian mechanism.

    Attributes:
        noise: Standard deviation of the noise divided by the sensitivity.
        sampling: Probability with which a patient takes part in a release; 1 = always.
        steps: Number of releases.
    """

    noise: float
    sampling: float = 1.0
    steps: int = 1


def epsilon_of(spent: Iterable[Spending], delta: float) -> float:
    """Return epsilon of the composition of all releases at a delta.

    Args:
        spent: The releases, in any order; none cost 0.
        delta: In (0, 1).

    Raises:
        FedsgcgError: PRV-976 without the package dp-accounting.
        ValueError: A delta, noise or probability out of range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: found {delta!r}, expected a number in (0, 1)")
    totals: dict[tuple[float, float], int] = {}
    for one in spent:
        if not (one.noise > 0 and math.isfinite(one.noise) and 0 < one.sampling <= 1):
            raise ValueError(f"found {one!r}, expected noise above zero and a probability")
        key = (one.noise, one.sampling)
        totals[key] = totals.get(key, 0) + one.steps
    used = tuple(sorted((*key, steps) for key, steps in totals.items() if steps))
    return _epsilon(used, delta) if used else 0.0


@lru_cache(maxsize=4096)
def _epsilon(spent: tuple[tuple[float, float, int], ...], delta: float) -> float:
    library = _library()
    accountant = library.rdp.RdpAccountant(ORDERS, library.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for noise, sampling, steps in spent:
        event = library.GaussianDpEvent(noise)
        if sampling < 1:
            event = library.PoissonSampledDpEvent(sampling, event)
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def _library() -> Any:
    try:
        import dp_accounting
        from absl import logging
    except ImportError as error:
        raise fail(
            "PRV-976",
            found="no package dp-accounting",
            expected="an installation with the extra privacy",
            action="pip install 'fedsgcg[privacy]'",
        ) from error
    # Orders at which the series of a sampled Gaussian does not converge are left out, which is
    # safe; the library logs each of them as a warning.
    logging.set_verbosity(logging.ERROR)
    return dp_accounting
