"""Runs every attack on one finished cell and writes the results to its folder (`attacks.json`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedsgcg.clients.methods.guidance import pixel_features
from fedsgcg.clients.methods.sgcg import labels_at
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.block_means import BlockMeans
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.attacks.inversion import span_of, subtract_rounds
from fedsgcg.deploy.attacks.membership import attack_model, attack_statistics, attack_updates
from fedsgcg.deploy.attacks.patients import Patient, network_of, patients_of_plan
from fedsgcg.server.records.received import FOLDER, PLAN, Received, read_received

RESULTS: Final = "attacks.json"
FEW_PIXELS: Final = (3, 10, 100, 1000)
"""Pixels of a class for which the span of its scatter is tested."""

NOTHING: Final[dict[str, Any]] = {"difference": None, "span": []}

OnStep = Callable[[str], None]


def attack_study(study: Path, on_step: OnStep = lambda _: None) -> list[Problem]:
    """Attack every finished cell whose replies were kept and that was not attacked before.

    Returns:
        Why cells could not be attacked; the others are.
    """
    problems: list[Problem] = []
    for folder in sorted(study.rglob(FOLDER)):
        cell = folder.parent
        finished = (cell / paths.WEIGHTS).is_file() and (folder / PLAN).is_file()
        if finished and not (cell / RESULTS).is_file():
            on_step(str(cell.relative_to(study)))
            try:
                attack_cell(cell, on_step)
            except FedsgcgError as error:
                problems.extend(error.problems)
    return problems


def attack_cell(cell: Path, on_step: OnStep = lambda _: None) -> dict[str, Any]:
    """Attack one cell and write `attacks.json`.

    Raises:
        FedsgcgError: PRV-981 when the replies were not kept or cannot be read.
    """
    try:
        plan = Plan.from_tree(json.loads((cell / FOLDER / PLAN).read_text()))
        received = read_received(cell)
        model = Weights.from_state(load_file(cell / paths.WEIGHTS))
        if not received:
            raise ValueError("no reply")
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, SafetensorError) as error:
        raise fail(
            "PRV-981",
            where=str(cell),
            found=str(error) or type(error).__name__,
            expected="a finished cell with the replies of its sites",
            action="run the study with privacy.record=true",
        ) from error
    patients = patients_of_plan(plan)
    on_step("membership")
    found: dict[str, Any] = {
        "membership_model": _asdict(attack_model(plan, model, patients)),
        "membership_update": _asdict(attack_updates(plan, received, patients, model)),
        "membership_statistics": _asdict(attack_statistics(plan, received, patients)),
    }
    # Of a secure sum nothing of a single hospital is there to reconstruct a patient from.
    single = not plan.privacy.secure_sums.enabled
    found |= reconstructions(plan, received, patients, on_step) if single else NOTHING
    text = json.dumps(found, indent=1, default=float)
    write_file(cell / RESULTS, text.encode())
    return found


def reconstructions(
    plan: Plan, received: list[Received], patients: list[Patient], on_step: OnStep
) -> dict[str, Any]:
    """Reconstruct patients of the hospital with the most training patients.

    `inversion.invert_gradient` is not run: it does not converge on a U-Net, and its failure would
    look like protection (docs/explanation/attacks.md).
    """
    members = [each for each in patients if each.member]
    groups = [[each for each in members if each.site == one.site] for one in members]
    first = max(groups, key=len)
    network = network_of(plan, received[-1].sent)
    on_step("differences of two rounds")
    # Without its only patient a hospital sends nothing.
    several = len(first) > 1
    difference = asdict(subtract_rounds(network, first, plan)) if several else None
    on_step("spans of few pixels")
    return {"difference": difference, "span": spans(network, first, plan)}


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


def _asdict(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
