"""The model card: how a model was trained, selected and evaluated, and its expected input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from fedsgcg.common.images.read import PICTURE
from fedsgcg.common.run_folder import paths
from fedsgcg.common.run_folder.tables import SCHEMA_VERSION, cell_of
from fedsgcg.common.settings.plan import DataSettings, Plan
from fedsgcg.server.records.checkpoint import Best

SELECTIONS = {
    "last": "the model of the last round",
    "source_validation": (
        "the model with the highest Dice on the training sites' own validation cases"
    ),
}

METRICS = {
    "dice": "2 |P∩T| / (|P| + |T|); 1 when both are empty",
    "asd": "mean distance from the predicted surface to the true one",
    "assd": "mean distance over the pooled surface points of both",
    "hd95": "95th percentile of the pooled distances of both surfaces (as medpy)",
    "hd95_max": "larger of the two directed 95th percentiles (as MONAI)",
    "empty": (
        "with one of the two masks empty the distances are undefined, left out of means and counted"
    ),
}

PREPROCESSING: Final = (
    *("image_size", "aspect", "spacing", "stack", "intensity", "flat_sigma"),
    *("activation", "threshold"),
    *("largest_component", "fill_holes", "spacing_unit"),
)


RULES: Final = {
    "share": "as near as whole patients allow",
    "hash": "those whose hash is below the share",
}
"""Meaning of `data.split`."""


def protocol(
    plan: Plan, training: Sequence[str], selected_round: int, *, validated: bool = True
) -> dict[str, Any]:
    """Describe the protocol as text, for `model.json` and the report.

    Args:
        plan: The plan of the federation.
        training: Names of the sites that trained.
        selected_round: Round whose model was evaluated.
        validated: Whether that model has a source-validation score, without which none can be
            selected by it.
    """
    data, federation = plan.data, plan.federation
    selection = SELECTIONS[federation.selection]
    if not validated:
        selection = SELECTIONS["last"] + _unvalidated(plan)
    unit = "pixel" if data.spacing_unit == "pixel" else "pixel, and mm where the spacing is real"
    return {
        "trained": sorted(training),
        "heldout": plan.heldout,
        "observers": sorted(plan.observers),
        "unlabelled": [site for site in sorted(plan.unlabelled) if plan.role(site) == "unlabelled"],
        "upper_bound": [site for site in sorted(plan.unlabelled) if plan.role(site) == "train"],
        "splits": (
            f"by patient; {data.validation_fraction:.0%} of a training site's patients are source "
            f"validation ({RULES[data.split]}), unless the site's own file sets another share; "
            "every case of the held-out site is its test set unless the manifest says otherwise"
        ),
        "selection": selection,
        "selected_round": selected_round,
        "rounds": federation.rounds,
        "evaluated": (
            "every slice of every test case, normalisation in evaluation mode, at the images' own "
            "size"
        ),
        "decision": (
            "probabilities at training size, bilinear to the images' own size, then "
            f"{_decision(plan)}"
        ),
        "post_processing": _post_processing(plan),
        "metrics": METRICS,
        "distance_unit": unit,
        "structures": {name: list(parts) for name, parts in data.structures.items()},
    }


def _decision(plan: Plan) -> str:
    if plan.data.activation == "sigmoid":
        return f"above {plan.data.threshold:g} for each structure"
    return "the likeliest class"


def _unvalidated(plan: Plan) -> str:
    """Why selection by source validation was impossible; "" if it was not requested."""
    wanted = plan.federation.selection == "source_validation"
    return ", because no site has a validation case to choose by" if wanted else ""


def _post_processing(plan: Plan) -> dict[str, str]:
    """Describe the post-processing of each structure's mask, including an empty one."""
    parts = {name: set(classes) for name, classes in plan.data.structures.items()}
    return {name: "; ".join(_steps(plan.data, name, parts)) for name in parts}


def _steps(data: DataSettings, name: str, parts: Mapping[str, set[str]]) -> Iterator[str]:
    yield "largest connected component" if data.largest_component else "every component kept"
    yield "holes filled in each slice" if data.fill_holes else "holes kept"
    outer = [other for other, classes in parts.items() if classes > parts[name]]
    if outer and (data.largest_component or data.fill_holes):
        yield f"cut to {' and '.join(outer)}"
    yield "empty stays empty"


def expected_input(data: DataSettings, kinds: Sequence[str], *, colour: bool) -> dict[str, Any]:
    """Describe the images that the network expects, for users of the model.

    Args:
        data: Settings of the data.
        kinds: Kinds of the training images; empty if not reported.
        colour: Whether a training picture has colours.

    Returns:
        Kinds of image, channels and what they are for each, and what becomes of the spacing.
    """
    reach = data.stack // 2
    slices = ["z" if not k else f"z{k:+d}" for k in range(-reach, reach + 1)]
    volume = "slices " + ", ".join(slices) if reach else "one slice, three times"
    meaning = {
        PICTURE: "red, green, blue; of a grey picture its values, three times",
        "volume": volume,
    }
    seen = {PICTURE if kind == PICTURE else "volume" for kind in kinds} or set(meaning)
    side = data.image_size
    return {
        "images": sorted(seen),
        "channels": data.in_channels,
        "colour": colour,
        "channel_meaning": {name: text for name, text in meaning.items() if name in seen},
        "size": [side, side],
        "spacing": f"{_resizing(data)}; masks return to the image's own grid",
    }


def _resizing(data: DataSettings) -> str:
    side = data.image_size
    if data.spacing:
        return (
            f"a slice has pixels of {data.spacing:g} mm in the middle of {side}x{side} pixels; if "
            "it is larger, it is made smaller"
        )
    if data.aspect == "pad":
        return f"a slice or picture is resized into {side}x{side} pixels and keeps its shape"
    return f"a slice or picture is resized to {side}x{side} pixels whatever its spacing"


def model_card(
    plan: Plan,
    chosen: Best,
    training: Sequence[str],
    *,
    prototypes: bool,
    kinds: Sequence[str] = (),
    colour: bool = False,
) -> dict[str, Any]:
    """Return the content of `model.json`: how to use the model, and how it was trained.

    Args:
        plan: The plan.
        chosen: The selected model, its round and its source-validation Dice (NaN if unknown).
        training: Sites that trained.
        prototypes: Whether the run folder contains `prototypes.arrow`.
        kinds: Kinds of the training images (`common.images.read.KINDS`); empty if not reported.
        colour: Whether a training picture has colours.
    """
    data = asdict(plan.data)
    network = asdict(plan.network) | {
        "in_channels": plan.data.in_channels,
        "out_channels": plan.data.out_channels,
    }
    return cell_of(plan) | {
        "schema_version": SCHEMA_VERSION,
        "run": plan.run,
        "plan": plan.digest(),
        "data": plan.data.name,
        "kinds": list(kinds),
        "input": expected_input(plan.data, kinds, colour=colour),
        "weights": paths.WEIGHTS,
        "digest": chosen.weights.digest(),
        "network": network,
        "domain_pool": sorted(training) if plan.network.domains else [],
        "classes": list(plan.data.classes),
        "labels": plan.data.classes,
        "structures": plan.data.structures,
        "preprocessing": {name: data[name] for name in PREPROCESSING},
        "selection": plan.federation.selection,
        "selected_round": chosen.round,
        "rounds": plan.federation.rounds,
        "validation_dice": chosen.score,
        "prototypes": paths.PROTOTYPES if prototypes else None,
        "normalize": plan.unit_features,
        "protocol": protocol(plan, training, chosen.round, validated=math.isfinite(chosen.score))
        | {"images": ", ".join(f"{kind}s" for kind in kinds)},
    }
