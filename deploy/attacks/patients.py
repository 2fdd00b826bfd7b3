"""The patients that an attacker wants to know about: those a hospital trained on, and others.

The reference is as near as possible: patients of the same hospital, from the same files, that the
hospital kept out of training for validation. An attack that only recognises a hospital therefore
finds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedsgcg.clients.data.case_files import open_site, resolve_cache
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.device import choose_device
from fedsgcg.clients.methods.base import segmentation_loss
from fedsgcg.clients.methods.class_statistics import batch_statistics
from fedsgcg.clients.methods.private_statistics import patients_of
from fedsgcg.common.heads import build_trained
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Weights

MOST_SLICES = 8
"""Most slices of a patient that an attack looks at, spread over the volume."""


@dataclass(frozen=True)
class Patient:
    """One patient of a hospital.

    Attributes:
        site: The hospital.
        member: Whether it trained on the patient.
        images: (Z, C, S, S) some of its slices.
        labels: (Z, S, S) int64.
    """

    site: str
    member: bool
    images: torch.Tensor
    labels: torch.Tensor


def patients_of_plan(plan: Plan) -> list[Patient]:
    """Return the training and validation patients of all training hospitals of a plan."""
    choose_device("cpu", plan.site.threads)
    found = []
    for name in plan.data.sites:
        if plan.role(name) != "train":
            continue
        site = open_site(Path(plan.data.root), name, plan.data)
        store = open_store(site, plan.data, resolve_cache(plan.site), heldout=False)
        for split in ("train", "validation"):
            for table, slices in patients_of([store], [store.slices(split)]):
                chosen = slices[np.unique(np.linspace(0, len(slices) - 1, MOST_SLICES, dtype=int))]
                images, labels = table.stack(chosen)
                found.append(
                    Patient(
                        name,
                        split == "train",
                        torch.from_numpy(images),
                        torch.from_numpy(labels).long(),
                    )
                )
    return found


def network_of(plan: Plan, weights: Weights) -> nn.Module:
    """Return the network of a plan with weights, in evaluation mode.

    Weights without the heads that serve training alone are those of a selected model.
    """
    network = build_trained(plan, None)
    state = {name: torch.from_numpy(np.array(array)) for name, array in weights.to_state().items()}
    network.load_state_dict(state, strict=False)
    return network.eval()


def losses(network: nn.Module, patients: Sequence[Patient], plan: Plan) -> np.ndarray:
    """Return the segmentation loss (P,) of each patient."""
    with torch.no_grad():
        return np.array(
            [
                float(segmentation_loss(network(each.images)[0], each.labels, plan.data))
                for each in patients
            ]
        )


def statistics_of(network: nn.Module, patient: Patient, plan: Plan) -> ClassStatistics:
    """Return the class statistics of one patient's slices."""
    with torch.no_grad():
        return batch_statistics(network(patient.images)[1], patient.labels, plan)
