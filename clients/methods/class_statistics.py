"""Measures a model on a site's training slices: class statistics and BatchNorm moments.

Every site measures the same model, the one it received. The merged prototypes therefore equal those
of the pooled pixels (SgCG eqs. 1-3, "Statistics" in docs/explanation/sgcg.md), and the merged
moments equal those of the pooled inputs of every BatchNorm layer.

Legend: K classes, A feature channels, B batch, N pixels, D source domains of the client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsgcg.clients.data.augment import augment_batch
from fedsgcg.clients.data.batches import gather, index_batches
from fedsgcg.clients.device import autocast_for, precision
from fedsgcg.clients.methods.guidance import IGNORE, pixel_features
from fedsgcg.clients.methods.sgcg import labels_at
from fedsgcg.common.feature_samples import sample_pixels
from fedsgcg.common.settings.plan import MethodSettings, Plan
from fedsgcg.common.sgcg.loss import class_moments
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.block_means import BlockMeans
from fedsgcg.common.wire.norm_moments import NormMoments

if TYPE_CHECKING:
    from fedsgcg.clients.data.store import CaseStore, SliceTable

SAMPLED_BATCHES, SAMPLED_SLICES = 4, 8  # batches, and slices per batch, sampled for a t-SNE

NormMode = Literal["batch", "running"]


def site_statistics(
    network: nn.Module,
    tables: Sequence[SliceTable],
    plan: Plan,
    device: torch.device,
    rngs: Sequence[np.random.Generator],
    norm_mode: NormMode | None = None,
) -> ClassStatistics:
    """Return count, mean and scatter of every class over all pixels of the training slices.

    The slices are not augmented.

    Args:
        network: Holds the received global weights; neither its weights nor its running moments
            change.
        tables: The training slices of each source domain.
        plan: `unit_features` determines the representation.
        device: Device of the network.
        rngs: Generators of the slice order of each domain, which matters only with
            `norm_mode=batch`.
        norm_mode: `batch` or `running`; None selects `prototypes.norm_mode`.

    Returns:
        Statistics in float64, (K,), (K, A) and (K, A, A).
    """
    total = ClassStatistics.empty(plan.data.num_classes, plan.network.num_features)
    with torch.no_grad(), statistics_mode(network, norm_mode or plan.prototypes.norm_mode):
        for images, labels in statistics_batches(tables, plan.method, rngs):
            total = total + batch_statistics(
                _features(network, images, plan, device), labels.to(device), plan
            )
    return total


def site_block_means(
    network: nn.Module,
    tables: Sequence[SliceTable],
    plan: Plan,
    device: torch.device,
    rngs: Sequence[np.random.Generator],
    norm_mode: NormMode | None = None,
    *,
    generator: torch.Generator,
) -> BlockMeans:
    """Return count and mean of random blocks of every class's pixels.

    Args:
        network: As in `site_statistics`.
        tables: As in `site_statistics`.
        plan: `prototypes.blocks` blocks of each class.
        device: Device of the network.
        rngs: As in `site_statistics`.
        norm_mode: As in `site_statistics`.
        generator: Assigns the pixels to blocks; on the CPU.
    """
    num_classes, blocks = plan.data.num_classes, plan.prototypes.blocks
    total = ClassStatistics.empty(num_classes * blocks, plan.network.num_features)
    with torch.no_grad(), statistics_mode(network, norm_mode or plan.prototypes.norm_mode):
        for images, labels in statistics_batches(tables, plan.method, rngs):
            features = _features(network, images, plan, device)
            pixels = pixel_features(features, plan.unit_features)
            classes = labels_at(labels.to(device), features.shape[-1], num_classes).reshape(-1)
            block = torch.randint(blocks, classes.shape, generator=generator).to(device)
            known = classes < num_classes
            cells = torch.where(known, classes * blocks + block, total.num_classes)
            moments = class_moments(
                pixels, cells, total.num_classes, ignore_index=total.num_classes
            )
            total = total + ClassStatistics(*(part.double().cpu().numpy() for part in moments))
    shape = (num_classes, blocks)
    return BlockMeans(
        total.count.reshape(shape), total.mean.reshape(*shape, -1), plan.unit_features
    )


def site_moments(
    network: nn.Module,
    tables: Sequence[SliceTable],
    plan: Plan,
    device: torch.device,
    rngs: Sequence[np.random.Generator],
    generator: torch.Generator,
) -> NormMoments:
    """Return the moments of the inputs of every BatchNorm layer over the training slices.

    Each batch is normalised by its own moments. Batches are composed as in training: augmented,
    because plain slices have narrower moments than those the weights were trained with, and mixed
    from all domains, so that a small domain has the same weight as in training.

    Args:
        network: Holds the merged weights; neither its weights nor its running moments change.
        tables: The training slices of each source domain.
        plan: Batch sizes and augmentation.
        device: Device of the network.
        rngs: Generators of the slice order of each domain.
        generator: Generator of the augmentation, on the device.
    """
    with torch.no_grad(), _measured_moments(network) as measured:
        for images, labels in statistics_batches(tables, plan.method, rngs):
            changed, _ = augment_batch(images.to(device), labels.to(device), plan, generator)
            _features(network, changed, plan, device)
            measured.take()
    return measured.moments()


def _features(
    network: nn.Module, images: torch.Tensor, plan: Plan, device: torch.device
) -> torch.Tensor:
    """Run the network on a batch (B, C, S, S); return its feature map (B, A, h, w)."""
    with autocast_for(precision(plan.method, device), device):
        features: torch.Tensor = network(images.to(device, memory_format=torch.channels_last))[1]
    return features


def statistics_batches(
    tables: Sequence[SliceTable], settings: MethodSettings, rngs: Sequence[np.random.Generator]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches composed as in training, over one epoch of the largest domain.

    A client with several domains trains on batches that mix them, and its BatchNorm normalises the
    mixture. Normalising each domain separately would give other features than those in the loss.
    Repeated slices of a smaller domain only complete the mixture: their labels are `IGNORE`, so
    that every pixel is counted once.

    Yields:
        Images (B, C, S, S) float32 in [-1, 1] and labels (B, S, S) int64, on the CPU.
    """
    once = replace(settings, steps_per_round=0, local_epochs=1)
    seen = [np.zeros(len(table), np.bool_) for table in tables]
    for chosen in index_batches(tables, once, rngs):
        images, labels = gather(tables, chosen)
        again = np.concatenate(
            [known[numbers] for known, numbers in zip(seen, chosen, strict=True)]
        )
        for known, numbers in zip(seen, chosen, strict=True):
            known[numbers] = True
        labels[torch.from_numpy(again)] = IGNORE
        yield images, labels


def sample_features(
    network: nn.Module,
    table: SliceTable,
    plan: Plan,
    device: torch.device,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Draw features of single pixels for the t-SNE of a report; they stay at the site.

    Returns:
        Features (P, A) in the representation of the loss, and true classes (P,); at most
        `site.feature_samples` pixels of each class.
    """
    slices = rng.permutation(len(table))[: SAMPLED_BATCHES * SAMPLED_SLICES]
    most = -(-plan.site.feature_samples // SAMPLED_BATCHES)
    features = [np.zeros((0, plan.network.num_features), np.float32)]
    classes = [np.zeros(0, np.int64)]
    dtype = precision(plan.method, device)
    with torch.no_grad(), statistics_mode(network, "running"):
        for start in range(0, len(slices), SAMPLED_SLICES):
            images, labels = table.stack(slices[start : start + SAMPLED_SLICES])
            with autocast_for(dtype, device):
                _, maps = network(
                    torch.from_numpy(images).to(device, memory_format=torch.channels_last)
                )
            reduced = labels_at(torch.from_numpy(labels), maps.shape[-1], plan.data.num_classes)
            flat = reduced.reshape(-1).numpy()
            chosen = sample_pixels(flat, rng, most)
            pixels = pixel_features(maps, plan.unit_features)
            pixels = pixels[torch.from_numpy(chosen).to(device)]
            features.append(pixels.cpu().numpy())
            classes.append(flat[chosen])
    return np.concatenate(features), np.concatenate(classes)


def batch_statistics(
    penultimate: torch.Tensor, labels: torch.Tensor, plan: Plan
) -> ClassStatistics:
    """Return the statistics of one batch, computed on the features' device.

    Args:
        penultimate: (B, A, H, W) feature map.
        labels: (B, H', W') class indices, 255 = ignore.
        plan: Whether features are normalised, and K.
    """
    num_classes = plan.data.num_classes
    pixels = pixel_features(penultimate, plan.unit_features)
    labels = labels_at(labels, penultimate.shape[-1], num_classes).reshape(-1)
    moments = class_moments(pixels, labels, num_classes, ignore_index=IGNORE)
    count, mean, scatter = (part.double().cpu().numpy() for part in moments)
    return ClassStatistics(count, mean, scatter)


class _Measured:
    """Accumulates the moments that each BatchNorm layer computes for its batch.

    With momentum 1 a layer's running moments are those of its last batch, computed by the
    normalising kernel without another pass over the feature maps. Batches are pooled in float64.
    """

    def __init__(self, layers: dict[str, _BatchNorm]) -> None:
        self._layers = layers
        self._sizes = dict.fromkeys(layers, 0)
        self._total = NormMoments.empty(
            {name: layer.num_features for name, layer in layers.items()}
        )
        self._handles = [
            layer.register_forward_pre_hook(self._counter(name)) for name, layer in layers.items()
        ]

    def _counter(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._sizes[name] = inputs[0].numel() // inputs[0].shape[1]

        return count

    def take(self) -> None:
        """Add the moments of the network's last batch."""
        sizes = np.array(list(self._sizes.values()), dtype=np.float64)
        mean, variance = (
            torch.cat([getattr(layer, name) for layer in self._layers.values()])
            .double()
            .cpu()
            .numpy()
            for name in ("running_mean", "running_var")
        )
        degrees = np.repeat(np.maximum(sizes - 1.0, 0.0), list(self._total.layers.values()))
        self._total = self._total + NormMoments(self._total.layers, sizes, mean, variance * degrees)

    def moments(self) -> NormMoments:
        """Return the moments of all batches so far."""
        return self._total

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def _measured_moments(network: nn.Module) -> Iterator[_Measured]:
    """Normalise each batch by its own moments and record these; restore the state afterwards."""
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    was_training = network.training
    kept = [
        (layer, layer.momentum, {key: value.clone() for key, value in layer.named_buffers()})
        for layer in layers.values()
    ]
    network.eval()
    measured = _Measured(layers)
    try:
        for layer in layers.values():
            layer.train()
            layer.momentum = 1.0
        yield measured
    finally:
        measured.close()
        for layer, momentum, buffers in kept:
            layer.momentum = momentum
            with torch.no_grad():
                for key, value in buffers.items():
                    getattr(layer, key).copy_(value)
        network.train(was_training)


@contextmanager
def statistics_mode(network: nn.Module, norm_mode: str) -> Iterator[None]:
    """Use BatchNorm as in training (`batch`) or evaluation (`running`), without changing buffers.

    With `track_running_stats` off, BatchNorm uses the moments of its batch and leaves running mean,
    variance and step counter unchanged, so no buffer has to be restored.
    """
    was_training = network.training
    layers = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
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


def cases_of_classes(stores: Sequence[CaseStore], num_classes: int) -> list[set[tuple[str, int]]]:
    """Return for each class the (hospital, case index) in whose training slices it occurs."""
    seen: list[set[tuple[str, int]]] = [set() for _ in range(num_classes)]
    for store in stores:
        table = store.slices("train")
        for index in np.unique(table.case_of):
            stored, chosen = store.stored[index], table.z_of[table.case_of == index]
            # Resizing may remove a small structure, so the class must also occur at training size.
            for value in np.flatnonzero(stored.present[chosen].any(axis=0))[:num_classes]:
                if (stored.label[chosen[stored.present[chosen, value]]] == value).any():
                    seen[value].add((store.site, int(index)))
    return seen


def patients_per_class(stores: Sequence[CaseStore], num_classes: int) -> npt.NDArray[np.int64]:
    """Return the number of training patients (K,) in whose slices a class occurs."""
    patient = {(store.site, case.index): case.patient for store in stores for case in store.cases}
    patients = [
        {(site, patient[site, index]) for site, index in cases}
        for cases in cases_of_classes(stores, num_classes)
    ]
    return np.asarray([len(found) for found in patients], dtype=np.int64)


def pixels_per_class(stores: Sequence[CaseStore], num_classes: int) -> npt.NDArray[np.int64]:
    """Return the number of pixels (K,) of each class in the training slices at training size."""
    total = np.zeros(num_classes, np.int64)
    for store in stores:
        table = store.slices("train")
        for index in np.unique(table.case_of):
            labels = store.stored[index].label[table.z_of[table.case_of == index]]
            total += np.bincount(labels.reshape(-1), minlength=IGNORE + 1)[:num_classes]
    return total
