"""Runs every attack on one finished cell and writes the results to its folder (`attacks.json`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from fedsgcg.clients.methods.guidance import pixel_features
from fedsgcg.clients.methods.sgcg import labels_at
from fedsgcg.common.errors import fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.block_means import BlockMeans
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.attacks.inversion import invert_gradient, span_of, subtract_rounds
from fedsgcg.deploy.attacks.membership import attack_model, attack_statistics, attack_updates
from fedsgcg.deploy.attacks.patients import Patient, network_of, patients_of_plan
from fedsgcg.server.records.received import FOLDER, PLAN, Received, read_received

RESULTS: Final = "attacks.json"
FEW_PIXELS: Final = (3, 10, 100, 1000)
"""Pixels of a class for which the span of its scatter is tested."""

OnStep = Callable[[str], None]


def attack_study(study: Path, on_step: OnStep = lambda _: None) -> list[Path]:
    """Attack every finished cell whose replies were kept and that was not attacked before.

    Returns:
        The cells that were attacked.
    """
    cells = []
    for folder in sorted(study.rglob(FOLDER)):
        cell = folder.parent
        finished = (cell / paths.WEIGHTS).is_file() and (folder / PLAN).is_file()
        if finished and not (cell / RESULTS).is_file():
            on_step(str(cell.relative_to(study)))
            attack_cell(cell, on_step)
            cells.append(cell)
    return cells


def attack_cell(cell: Path, on_step: OnStep = lambda _: None) -> dict[str, Any]:
    """Attack one cell and write `attacks.json`.

    Raises:
        FedsgcgError: PRV-981 when the replies were not kept or cannot be read.
    """
    try:
        plan = Plan.from_tree(json.loads((cell / FOLDER / PLAN).read_text()))
        received = read_received(cell)
        model = Weights.from_state(load_file(cell / paths.WEIGHTS))
    except (OSError, ValueError, KeyError) as error:
        raise fail(
            "PRV-981",
            where=str(cell),
            found=type(error).__name__,
            expected="a finished cell with the replies of its sites",
            action="run the study with privacy.record=true",
        ) from error
    patients = patients_of_plan(plan)
    on_step("membership")
    found: dict[str, Any] = {
        "membership_model": _asdict(attack_model(plan, model, patients)),
        "membership_update": _asdict(attack_updates(plan, received, patients)),
        "membership_statistics": _asdict(attack_statistics(plan, received, patients)),
    }
    members = [each for each in patients if each.member]
    groups = [[each for each in members if each.site == one.site] for one in members]
    first = max(groups, key=len)  # the hospital with the most training patients
    network = network_of(plan, _last_sent(received))
    on_step("differences of two rounds")
    # Without its only patient a hospital sends nothing.
    several = len(first) > 1
    found["difference"] = asdict(subtract_rounds(network, first, plan)) if several else None
    found["span"] = spans(network, first, plan)
    on_step("inversion of a gradient")
    others = [each for each in patients if each.site == first[0].site and each is not first[0]]
    inverted = invert_gradient(network, first[0], others, plan)
    found["gradient"] = {"correlation": inverted.correlation, "chance": inverted.chance}
    text = json.dumps(found, indent=1, default=float)
    write_file(cell / RESULTS, text.encode())
    return found


def spans(network: torch.nn.Module, patients: list[Patient], plan: Plan) -> list[dict[str, Any]]:
    """Test the span of a class's scatter for some numbers of pixels, as if the floor were lower.

    Empty with noise in the statistics, where a class with a single patient is not sent.
    """
    if plan.privacy.dp.statistics:
        return []
    with torch.no_grad():
        maps = network(patients[0].images)[1]
        rows = pixel_features(maps, plan.unit_features)
        width, classes = maps.shape[-1], plan.data.num_classes
        labels = labels_at(patients[0].labels, width, classes).reshape(-1)
        other = pixel_features(network(patients[-1].images)[1], plan.unit_features)
    chosen = (labels == 1).nonzero().reshape(-1)
    rest = labels_at(patients[-1].labels, width, classes).reshape(-1)
    rest = (rest == 1).nonzero().reshape(-1)
    found = []
    for number in FEW_PIXELS:
        if len(chosen) < number or not len(rest):
            continue
        keep = chosen[torch.linspace(0, len(chosen) - 1, number).long()]
        pixels, strangers = rows[keep].double().numpy(), other[rest[:1000]].double().numpy()
        found.append(asdict(span_of(_sent_of(pixels, plan), 0, pixels, strangers)))
    return found


def _sent_of(pixels: npt.NDArray[np.float64], plan: Plan) -> ClassStatistics:
    """Return what is sent of the pixels (n, A) of one class, as the coordinator reads it."""
    if plan.prototypes.shared == "full":
        return ClassStatistics.from_features(pixels, np.zeros(len(pixels), np.int64), 1)
    blocks = plan.prototypes.blocks
    chosen = np.random.default_rng(0).integers(0, blocks, len(pixels))
    parts = ClassStatistics.from_features(pixels, chosen, blocks)
    return BlockMeans(parts.count[None], parts.mean[None], plan.unit_features).estimate()


def _last_sent(received: list[Received]) -> Weights:
    if not received:
        raise fail("PRV-981", found="no reply", expected="replies", action="run the cell again")
    return received[-1].sent


def _asdict(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
