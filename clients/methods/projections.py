"""Measures the projections of a site's training slices, SegCLR's `global_negatives`.

They are the projections that NT-Xent compares in training: of the same pairs, in batches composed
in the same way. The merged statistics of several sites therefore equal those of their pooled
projections.

Legend: B pairs, d length of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fedsgcg.clients.data.batches import gather, index_batches
from fedsgcg.clients.data.pairs import gather_partners, make_pairs, uses_slices
from fedsgcg.clients.device import autocast_for, precision
from fedsgcg.clients.methods.class_statistics import statistics_mode
from fedsgcg.clients.methods.segclr import project
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.sgcg.loss import class_moments
from fedsgcg.common.statistics import ClassStatistics

if TYPE_CHECKING:
    from fedsgcg.clients.data.store import CaseStore, SliceTable


def site_projections(
    network: nn.Module,
    tables: Sequence[SliceTable],
    plan: Plan,
    device: torch.device,
    rngs: Sequence[np.random.Generator],
    generator: torch.Generator,
) -> ClassStatistics:
    """Return count, mean and scatter of the projections of unit length, as one class.

    Both images of the pair of every training slice count, so that the count is twice the number of
    slices. Labels are not read.

    Args:
        network: Holds the received weights and heads; it does not change.
        tables: The training slices of each source domain.
        plan: Pairs and batch size.
        device: Device of the network.
        rngs: Generators of the slice order and of the partners of each domain.
        generator: Generator of the augmentation, on the device.

    Returns:
        Statistics in float64, (1,), (1, d) and (1, d, d).
    """
    settings, once = plan.method.segclr, replace(plan.method, steps_per_round=0, local_epochs=1)
    total = ClassStatistics.empty(*plan.described_shape)
    dtype = precision(plan.method, device)
    with torch.no_grad(), statistics_mode(network, plan.prototypes.norm_mode):
        for chosen in index_batches(tables, once, rngs):
            images = gather(tables, chosen)[0].to(device)
            partners = None
            if uses_slices(plan):
                distance = settings.slice_distance
                partners = gather_partners(tables, chosen, distance, rngs[0]).to(device)
            with autocast_for(dtype, device):
                projected = project(network, make_pairs(images, partners, settings, generator))
            unit = F.normalize(projected.float(), dim=1)
            same = torch.zeros(len(unit), dtype=torch.int64, device=device)
            moments = class_moments(unit, same, 1)
            total = total + ClassStatistics(*(part.double().cpu().numpy() for part in moments))
    return total


def training_patients(stores: Sequence[CaseStore]) -> npt.NDArray[np.int64]:
    """Return the number of patients (1,) with a training slice."""
    found = {
        (store.site, store.cases[index].patient)
        for store in stores
        for index in np.unique(store.slices("train").case_of)
    }
    return np.asarray([len(found)], dtype=np.int64)


def training_slices(stores: Sequence[CaseStore]) -> npt.NDArray[np.int64]:
    """Return the number of training slices (1,)."""
    return np.asarray([sum(len(store.slices("train")) for store in stores)], dtype=np.int64)
