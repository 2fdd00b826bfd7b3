"""The held-out protocol: who may be asked to train, which model is chosen, and the words that the report prints.

The held-out hospital receives weights and returns metrics. It never receives a training or statistics message, so it
cannot contribute weights, statistics or normalisation; and its score never chooses a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.errors import fail
from common.settings.plan import Plan
from common.wire.messages import AMPLITUDES, STATISTICS, TRAIN
from common.wire.payload import Weights
from server.records.checkpoint import Best

CONTRIBUTING = (TRAIN, STATISTICS, AMPLITUDES)
"""Message types whose replies flow into the global model."""


def guard_recipients(plan: Plan, message_type: str, sites: Iterable[str]) -> None:
    """Refuse to send a contributing message to a site whose role is not `train`; the last check before every push.

    Raises:
        FedsgcgError: ROL-201 naming the first such site.
    """
    if message_type not in CONTRIBUTING:
        return
    for site in sites:
        if (role := plan.role(site)) != "train":
            raise fail(
                "ROL-201",
                where=site,
                found=f"{message_type!r} to a site of role {role}",
                expected="role train",
            )


def source_score(parts: Sequence[tuple[float, float]]) -> float | None:
    """Return the source-validation Dice of a model over the training sites, each weighted by its validation cases.

    Args:
        parts: (Dice, number of validation cases) of each site that has any.

    Returns:
        The score, None when no site could tell. Values that are no Dice or no count are left out.
    """
    valid = [
        (dice, cases) for dice, cases in parts if 0.0 <= dice <= 1.0 and 0.0 < cases < float("inf")
    ]
    total = sum(cases for _, cases in valid)
    return sum(dice * cases for dice, cases in valid) / total if valid else None


def best_so_far(
    best: Best | None, number: int, score: float | None, weights: Weights
) -> Best | None:
    """Return the best model so far; an equal score keeps the earlier one, and round 0 (untrained) never counts."""
    if score is None or number < 1 or (best is not None and score <= best.score):
        return best
    return Best(number, score, weights)
