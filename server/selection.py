"""The held-out protocol: which sites may contribute, and which model is selected.

The held-out site receives weights and returns metrics. It never receives a training or statistics
message, so it cannot contribute weights, statistics or normalisation, and its score never affects
model selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedsgcg.common.errors import fail
from fedsgcg.common.settings.federation import TRAINING
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import (
    AMPLITUDES,
    STATISTICS,
    SUM_CHECK,
    SUM_KEYS,
    SUM_OPEN,
    SUM_SHARES,
    TRAIN,
)
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.records.checkpoint import Best

CONTRIBUTING = (
    *(TRAIN, STATISTICS, AMPLITUDES),
    *(SUM_KEYS, SUM_SHARES, SUM_CHECK, SUM_OPEN),
)
"""Message types whose replies contribute to the global model, or to the sum that does."""


def guard_recipients(plan: Plan, message_type: str, sites: Iterable[str]) -> None:
    """Refuse to send a contributing message to a site that does not train.

    A site without labels is asked for weights and for moments of its images, never for amplitudes.

    This is the last check before every request is sent.

    Raises:
        FedsgcgError: ROL-201 naming the first such site.
    """
    if message_type not in CONTRIBUTING:
        return
    for site in sites:
        allowed = ("train",) if message_type == AMPLITUDES else TRAINING
        if (role := plan.role(site)) not in allowed:
            raise fail(
                "ROL-201",
                where=site,
                found=f"{message_type!r} to a site of role {role}",
                expected=" or ".join(f"role {name}" for name in allowed),
            )


def source_score(parts: Sequence[tuple[float, float]]) -> float | None:
    """Return the mean source-validation Dice, each site weighted by its validation cases.

    Args:
        parts: (Dice, number of validation cases) of each site that has any.

    Returns:
        The score, None when no site has a valid one. A Dice outside [0, 1] or an invalid number of
        cases is ignored.
    """
    valid = [
        (dice, cases) for dice, cases in parts if 0.0 <= dice <= 1.0 and 0.0 < cases < float("inf")
    ]
    total = sum(cases for _, cases in valid)
    return sum(dice * cases for dice, cases in valid) / total if valid else None


def best_so_far(
    best: Best | None, number: int, score: float | None, weights: Weights
) -> Best | None:
    """Return the best model so far; a tie keeps the earlier one, untrained round 0 is ignored."""
    if score is None or number < 1 or (best is not None and score <= best.score):
        return best
    return Best(number, score, weights)
