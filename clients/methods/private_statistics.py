"""Class statistics with noise that hides every single patient.

Every patient counts once in each class that it has: its contribution is one, the mean feature, and
the mean of the products of its features' channels. With features of unit length each of these three
has a length of at most one, so that adding or removing a patient moves the sums of K classes by at
most sqrt(3 K), whatever the images. Contributions are rounded towards zero to a grid and added as
integers; exact discrete Gaussian noise is added to the sums (`common.differential_privacy.noise`).
With `prototypes.shared=means` there are no products, and the bound is sqrt(2 K).

What follows uses only the noisy sums: classes with too few noisy patients are left out, means are
moved into the unit ball, covariances to the nearest positive semi-definite matrix, with at most the
trace that unit features can have.

Legend: K classes, A feature channels, D = numbers of a contribution, P patients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedsgcg.clients.data.store import CaseStore, SliceTable
from fedsgcg.clients.device import autocast_for, precision
from fedsgcg.clients.methods.class_statistics import batch_statistics
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics

if TYPE_CHECKING:
    from fedsgcg.common.differential_privacy.noise import Noise

UNIT: Final = 4096
"""Grid steps of the sensitivity: the rounding of a contribution is far below the noise."""
DETECTABLE: Final = 2.0
"""Standard deviations of the noise that a class's number of patients must exceed."""

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def patients_of(
    stores: Sequence[CaseStore], tables: Sequence[SliceTable]
) -> Iterator[tuple[SliceTable, Integers]]:
    """Yield the slices of each patient, in the order of hospitals and patient ids."""
    for store, table in zip(stores, tables, strict=True):
        patient_of_case = np.array([case.patient for case in store.cases])
        patients = patient_of_case[table.case_of]
        for patient in np.unique(patients):
            yield table, np.flatnonzero(patients == patient)


def private_statistics(
    network: nn.Module,
    stores: Sequence[CaseStore],
    plan: Plan,
    device: torch.device,
    noise: Noise,
) -> ClassStatistics:
    """Return class statistics of the training slices with Gaussian noise on patient level.

    Args:
        network: Holds the received weights, without BatchNorm.
        stores: The cases of each of the site's hospitals.
        plan: Noise multiplier `privacy.dp.statistics_noise`, and the floor of patients.
        device: Device of the network.
        noise: Source of the noise.

    Returns:
        Statistics whose counts are (noisy) numbers of patients.
    """
    tables = [store.slices("train") for store in stores]
    means_only = plan.prototypes.shared == "means"
    total = np.zeros(
        contribution_size(plan.data.num_classes, plan.network.num_features, means_only)
    )
    sums = total.astype(np.int64)
    was_training = network.training
    network.eval()
    with torch.no_grad():
        for table, slices in patients_of(stores, tables):
            found = ClassStatistics.empty(plan.data.num_classes, plan.network.num_features)
            for start in range(0, len(slices), plan.method.batch_size):
                chosen = slices[start : start + plan.method.batch_size]
                found = found + _statistics(network, table, chosen, plan, device)
            sums += contribution(found, means_only)
    network.train(was_training)
    return noisy_statistics(
        sums,
        (plan.data.num_classes, plan.network.num_features),
        plan.privacy.dp.statistics_noise,
        noise,
        plan.privacy.min_patients,
        means_only=means_only,
    )


def contribution_size(num_classes: int, num_features: int, means_only: bool = False) -> int:
    """Return D, the numbers that a patient contributes."""
    products = 0 if means_only else num_features * (num_features + 1) // 2
    return num_classes * (1 + num_features + products)


def contribution(patient: ClassStatistics, means_only: bool = False) -> Integers:
    """Return what one patient adds to the sums, in grid steps.

    Args:
        patient: The statistics of all its pixels, of unit-length features.
        means_only: Leave out the products of channels.

    Returns:
        (D,) integers; the sum of their squares is at most UNIT^2, whatever the statistics.
    """
    present = (patient.count > 0).astype(np.float64)
    parts = [present[:, None], patient.mean * present[:, None]]
    if not means_only:
        second = patient.covariance + patient.mean[:, :, None] * patient.mean[:, None, :]
        rows, columns = np.triu_indices(patient.num_features)
        # An entry off the diagonal occurs twice in the matrix and once here.
        weight = np.where(rows == columns, 1.0, math.sqrt(2.0))
        parts.append(second[:, rows, columns] * weight * present[:, None])
    vector = np.concatenate(parts, axis=1)
    # Each part is at most one long, up to rounding; a feature that is not is shortened.
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        length = np.linalg.norm(vector[:, start:stop], axis=1, keepdims=True)
        vector[:, start:stop] /= np.maximum(length, 1.0)
        start = stop
    vector = np.where(np.isfinite(vector), vector, 0.0)
    scale = UNIT / sensitivity(patient.num_classes, means_only)
    whole = np.trunc(vector.reshape(-1) * scale).astype(np.int64)
    while int(whole @ whole) > UNIT * UNIT:  # rounding of the scale itself
        largest = int(np.argmax(np.abs(whole)))
        whole[largest] -= np.sign(whole[largest])
    return whole


def sensitivity(num_classes: int, means_only: bool = False) -> float:
    """Return the most by which one patient moves the sums, in Euclidean length."""
    return math.sqrt((2 if means_only else 3) * num_classes)


def noisy_statistics(
    sums: Integers,
    shape: tuple[int, int],
    multiplier: float,
    noise: Noise,
    min_patients: int,
    *,
    means_only: bool = False,
) -> ClassStatistics:
    """Add noise to sums of contributions and make valid statistics of them.

    Args:
        sums: (D,) sums of `contribution` over the patients.
        shape: (K, A).
        multiplier: Standard deviation of the noise divided by the sensitivity.
        noise: Source of the noise.
        min_patients: A class with fewer noisy patients is left out.
        means_only: The sums have no products; the covariance is then that of equal variance in all
            channels with the trace that unit features have, 1 - |mean|^2.
    """
    num_classes, num_features = shape
    sigma = math.ceil(multiplier * UNIT)
    drawn = np.array(noise.integers(sigma, sums.size), dtype=np.int64)
    step = sensitivity(num_classes, means_only) / UNIT
    scaled = np.asarray((sums + drawn) * step, dtype=np.float64)
    table: Array = scaled.reshape(num_classes, -1)
    count, first = table[:, 0], table[:, 1 : 1 + num_features]
    second = np.zeros((num_classes, num_features, num_features))
    if not means_only:
        rows, columns = np.triu_indices(num_features)
        weight = np.where(rows == columns, 1.0, math.sqrt(2.0))
        second[:, rows, columns] = table[:, 1 + num_features :] / weight
        second[:, columns, rows] = second[:, rows, columns]
    return valid_statistics(
        count, first, second, max(min_patients, DETECTABLE * sigma * step), means_only=means_only
    )


def valid_statistics(
    count: Array, first: Array, second: Array, floor: float, *, means_only: bool = False
) -> ClassStatistics:
    """Return the nearest possible statistics of noisy sums; uses nothing but the sums.

    Args:
        count: (K,) noisy numbers of patients.
        first: (K, A) noisy sums of mean features.
        second: (K, A, A) noisy sums of mean products; ignored with `means_only`.
        floor: A class with fewer patients is left out.
        means_only: The covariance follows from the mean alone.
    """
    whole = np.rint(count)
    seen = whole >= max(floor, 1.0)
    divisor = np.where(seen, whole, 1.0)
    mean = first / divisor[:, None]
    length = np.linalg.norm(mean, axis=1)
    mean = mean / np.maximum(length, 1.0)[:, None]
    room = np.maximum(1.0 - np.square(mean).sum(axis=1), 0.0)
    features = mean.shape[1]
    if means_only:
        covariance = room[:, None, None] / features * np.eye(features)
    else:
        raw = second / divisor[:, None, None] - mean[:, :, None] * mean[:, None, :]
        values, vectors = np.linalg.eigh((raw + raw.transpose(0, 2, 1)) / 2)
        values = np.maximum(values, 0.0)
        trace = values.sum(axis=1)
        shrink = np.divide(room, trace, out=np.ones_like(room), where=trace > room)
        covariance = np.einsum("kab,kb,kcb->kac", vectors, values * shrink[:, None], vectors)
        covariance = (covariance + covariance.transpose(0, 2, 1)) / 2
    return ClassStatistics(
        np.where(seen, whole, 0.0),
        np.where(seen[:, None], mean, 0.0),
        np.where(seen[:, None, None], covariance * divisor[:, None, None], 0.0),
    )


def _statistics(
    network: nn.Module, table: SliceTable, chosen: Integers, plan: Plan, device: torch.device
) -> ClassStatistics:
    images, labels = table.stack(chosen)
    with autocast_for(precision(plan.method, device), device):
        _, features = network(
            torch.from_numpy(images).to(device, memory_format=torch.channels_last)
        )
    return batch_statistics(features, torch.from_numpy(labels).long().to(device), plan)
