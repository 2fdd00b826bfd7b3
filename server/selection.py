"""The held-out protocol: who may be asked to train, which model is chosen, and the words that the report prints.

The held-out hospital receives weights and returns metrics. It never receives a training or statistics message, so it
cannot contribute weights, statistics or normalisation; and its score never chooses a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from common.errors import fail
from common.settings.plan import DataSettings, Plan
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
            raise fail("ROL-201", where=site, found=f"{message_type!r} to a site of role {role}", expected="role train")


def source_score(parts: Sequence[tuple[float, float]]) -> float | None:
    """Return the source-validation Dice of a model over the training sites, each weighted by its validation cases.

    Args:
        parts: (Dice, number of validation cases) of each site that has any.

    Returns:
        The score, None when no site could tell. Values that are no Dice or no count are left out.
    """
    valid = [(dice, cases) for dice, cases in parts if 0.0 <= dice <= 1.0 and 0.0 < cases < float("inf")]
    total = sum(cases for _, cases in valid)
    return sum(dice * cases for dice, cases in valid) / total if valid else None


def better(best: Best | None, number: int, score: float | None, weights: Weights) -> Best | None:
    """Return the best model so far; an equal score keeps the earlier one, and round 0 (untrained) never counts."""
    if score is None or number < 1 or (best is not None and score <= best.score):
        return best
    return Best(number, score, weights)


def protocol(plan: Plan, training: Sequence[str], selected_round: int, *, validated: bool = True) -> dict[str, Any]:
    """Return the protocol in words, for `model.json` and the report's protocol box.

    Args:
        plan: The plan of the federation.
        training: Names of the sites that trained.
        selected_round: Round whose model was evaluated.
        validated: Whether that model has a source-validation score; without one nothing could be chosen by it.
    """
    data, federation = plan.data, plan.federation
    return {
        "trained": sorted(training),
        "heldout": plan.heldout,
        "observers": sorted(plan.observers),
        "splits": (
            f"by patient; {data.validation_fraction:.0%} of a training site's patients are source validation; every "
            "case of the held-out site is its test set unless the manifest says otherwise"
        ),
        "selection": SELECTIONS[federation.selection] if validated else SELECTIONS["last"] + _unvalidated(plan),
        "selected_round": selected_round,
        "rounds": federation.rounds,
        "evaluated": "every slice of every test case, normalisation in evaluation mode, at the images' own size",
        "decision": f"probabilities at training size, bilinear to the images' own size, then {_decision(plan)}",
        "post_processing": _post_processing(plan),
        "metrics": METRICS,
        "distance_unit": "pixel" if data.spacing_unit == "pixel" else "pixel, and mm where the spacing is real",
        "structures": {name: list(parts) for name, parts in data.structures.items()},
    }


SELECTIONS = {
    "last": "the model of the last round",
    "source_validation": "the model with the highest Dice on the training sites' own validation cases",
}

METRICS = {
    "dice": "2 |P∩T| / (|P| + |T|); 1 when both are empty",
    "asd": "mean distance from the predicted surface to the true one",
    "assd": "mean distance over the pooled surface points of both",
    "hd95": "95th percentile of the pooled distances of both surfaces (as medpy)",
    "hd95_max": "larger of the two directed 95th percentiles (as MONAI)",
    "empty": "with one of the two masks empty the distances are undefined, left out of means and counted",
}


def _decision(plan: Plan) -> str:
    if plan.data.activation == "sigmoid":
        return f"above {plan.data.threshold:g} for each structure"
    return "the likeliest class"


def _unvalidated(plan: Plan) -> str:
    """What to add where no site had a validation case; nothing where none was needed."""
    wanted = plan.federation.selection == "source_validation"
    return ", because no site has a validation case to choose by" if wanted else ""


def _post_processing(plan: Plan) -> dict[str, str]:
    """Say for each structure what is done to its mask, and what becomes of one that is empty."""
    parts = {name: set(classes) for name, classes in plan.data.structures.items()}
    return {name: "; ".join(_steps(plan.data, name, parts)) for name in parts}


def _steps(data: DataSettings, name: str, parts: Mapping[str, set[str]]) -> Iterator[str]:
    yield "largest connected component" if data.largest_component else "every component kept"
    yield "holes filled in each slice" if data.fill_holes else "holes kept"
    outer = [other for other, classes in parts.items() if classes > parts[name]]
    if outer and (data.largest_component or data.fill_holes):
        yield f"cut to {' and '.join(outer)}"
    yield "empty stays empty"
