"""Class statistics of a site's training pixels under the received weights (methods.md 1.2, 1.8).

Every site describes the same model, the one it received, so the merged prototypes are those of the pooled pixels.
Legend: K classes, A feature channels, B batch, N pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clients.batches import batch_indices
from clients.device import arithmetic, precision
from clients.methods.guidance import IGNORE, pixel_features
from clients.methods.sgcg import labels_at
from common.feature_samples import sample_pixels
from common.plan import Plan
from common.sgcg import class_moments
from common.statistics import ClassStatistics

if TYPE_CHECKING:
    from clients.cases import CaseStore, SliceTable

SAMPLED_BATCHES, SAMPLED_SLICES = 4, 8  # slices from which the pixels of a t-SNE are drawn


def site_statistics(
    network: nn.Module, table: SliceTable, plan: Plan, device: torch.device, rng: np.random.Generator
) -> ClassStatistics:
    """Count, mean and scatter of every class over all pixels of the training slices, without augmentation.

    Args:
        network: Holds the received global weights; neither its weights nor its running moments change.
        table: The site's training slices.
        plan: `prototypes.norm_mode` and `prototypes.normalize` decide the representation.
        device: Where the network lies.
        rng: Order of the slices, which matters in `norm_mode=batch` alone.

    Returns:
        Statistics in float64, (K,), (K, A) and (K, A, A).
    """
    dtype = precision(plan.method, device)
    total = ClassStatistics.empty(plan.data.num_classes, plan.network.num_features)
    with torch.no_grad(), statistics_mode(network, plan.prototypes.norm_mode):
        for indices in batch_indices(len(table), plan.method.batch_size, rng):
            images, labels = table.stack(indices)
            batch = torch.from_numpy(images).to(device, memory_format=torch.channels_last)
            with arithmetic(dtype, device):
                _, penultimate = network(batch)
            total = total + batch_statistics(penultimate, torch.from_numpy(labels).to(device), plan)
    return total


def sample_features(
    network: nn.Module, table: SliceTable, plan: Plan, device: torch.device, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Draw features of single pixels of some slices, for the t-SNE of a simulation's report; they stay at the site.

    Returns:
        Features (P, A), in the representation that the loss compares, and true classes (P,), at most
        `site.feature_samples` pixels of each class.
    """
    slices = rng.permutation(len(table))[: SAMPLED_BATCHES * SAMPLED_SLICES]
    most = -(-plan.site.feature_samples // SAMPLED_BATCHES)
    features, classes = [np.zeros((0, plan.network.num_features), np.float32)], [np.zeros(0, np.int64)]
    dtype = precision(plan.method, device)
    with torch.no_grad(), statistics_mode(network, "running"):
        for start in range(0, len(slices), SAMPLED_SLICES):
            images, labels = table.stack(slices[start : start + SAMPLED_SLICES])
            with arithmetic(dtype, device):
                _, maps = network(torch.from_numpy(images).to(device, memory_format=torch.channels_last))
            small = labels_at(torch.from_numpy(labels), maps.shape[-1], plan.data.num_classes).reshape(-1).numpy()
            chosen = sample_pixels(small, rng, most)
            pixels = pixel_features(maps, plan.prototypes.normalize)[torch.from_numpy(chosen).to(device)]
            features.append(pixels.cpu().numpy())
            classes.append(small[chosen])
    return np.concatenate(features), np.concatenate(classes)


def batch_statistics(penultimate: torch.Tensor, labels: torch.Tensor, plan: Plan) -> ClassStatistics:
    """Statistics of one batch: moments on the device of the features, carried on in float64.

    Args:
        penultimate: (B, A, H, W) feature map.
        labels: (B, H', W') class indices, 255 = ignore.
        plan: Whether features are normalised, and K.
    """
    num_classes = plan.data.num_classes
    pixels = pixel_features(penultimate, plan.prototypes.normalize)
    labels = labels_at(labels, penultimate.shape[-1], num_classes).reshape(-1)
    moments = class_moments(pixels, labels, num_classes, ignore_index=IGNORE)
    count, mean, scatter = (part.double().cpu().numpy() for part in moments)
    return ClassStatistics(count, mean, scatter)


@contextmanager
def statistics_mode(network: nn.Module, norm_mode: str) -> Iterator[None]:
    """Evaluate with BatchNorm as in training (`batch`) or as in evaluation (`running`), changing no buffer.

    A BatchNorm that does not track uses the moments of its batch and leaves running mean, variance and step counter
    alone, so nothing has to be copied and put back.
    """
    was_training = network.training
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    network.eval()
    try:
        if norm_mode == "batch":
            for layer in layers:
                layer.train()
                layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        network.train(was_training)


def patients_per_class(stores: Sequence[CaseStore], num_classes: int) -> npt.NDArray[np.int64]:
    """Number of different training patients in whose slices a class occurs, (K,): what the patient floor compares."""
    seen: list[set[tuple[str, str]]] = [set() for _ in range(num_classes)]
    for store in stores:
        table = store.slices("train")
        for index in np.unique(table.case_of):
            stored, chosen = store.stored[index], table.z_of[table.case_of == index]
            # A small structure may vanish when a slice is resized: the slice must hold the class at training size too.
            for value in np.flatnonzero(stored.present[chosen].any(axis=0))[:num_classes]:
                if (stored.label[chosen[stored.present[chosen, value]]] == value).any():
                    seen[value].add((store.site, store.cases[int(index)].patient))
    return np.asarray([len(patients) for patients in seen], dtype=np.int64)
