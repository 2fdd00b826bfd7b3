"""How well block means replace the scatter matrix, on the features of a recorded cell.

    python -m tests.benchmarks.block_means CELL

CELL is the folder of a finished cell of a study with privacy.record=true, with class statistics.
For each number of blocks it prints the bytes of a site's message and the relative error of the
covariance pooled over all training hospitals, (|S - full| / |full|, Frobenius), mean over classes.
"""

from __future__ import annotations

import json
import sys
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch

from fedsgcg.clients.methods.guidance import pixel_features
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.block_means import BlockMeans
from fedsgcg.common.wire.payload import Identity, encode_statistics
from fedsgcg.deploy.attacks.patients import Patient, network_of, patients_of_plan
from fedsgcg.server.records.received import FOLDER, PLAN, read_received

BLOCKS = (2, 4, 8, 16, 64)
REPEATS = 5
IDENTITY = Identity("run", "", 1, "plan")


def main(cell: Path) -> None:
    """Print a line for each number of blocks."""
    plan = Plan.from_tree(json.loads((cell / FOLDER / PLAN).read_text()))
    network = network_of(plan, read_received(cell)[-1].sent)
    members = [each for each in patients_of_plan(plan) if each.member]
    sites = [
        pixels_of(network, [each for each in members if each.site == name], plan)
        for name in sorted({each.site for each in members})
    ]
    classes = plan.data.num_classes
    each_site = [ClassStatistics.from_features(*site, classes) for site in sites]
    full = reduce(add, each_site)
    print(f"full: {len(encode_statistics(full, IDENTITY))} bytes")
    rng = np.random.default_rng(0)
    for blocks in BLOCKS:
        errors, size = [], 0
        for _ in range(REPEATS):
            found = [block_means(site, blocks, classes, plan.unit_features, rng) for site in sites]
            size = len(found[0].encode(IDENTITY))
            merged = reduce(add, [each.estimate() for each in found])
            errors.append(np.mean(relative_error(merged.covariance, full.covariance)))
        print(f"{blocks} blocks: {size} bytes, error {np.mean(errors):.2f} ± {np.std(errors):.2f}")
    isotropic = np.trace(full.covariance, axis1=1, axis2=2)[:, None, None] * np.eye(
        full.num_features
    )
    error = np.mean(relative_error(isotropic / full.num_features, full.covariance))
    print(f"equal variance in all channels: error {error:.2f}")


def pixels_of(
    network: torch.nn.Module, patients: list[Patient], plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features (N, A) and classes (N,) of all pixels of some patients."""
    with torch.no_grad():
        features = [
            pixel_features(network(each.images)[1], plan.unit_features) for each in patients
        ]
    labels = torch.cat([each.labels.reshape(-1) for each in patients])
    return torch.cat(features).numpy(), labels.numpy()


def block_means(
    site: tuple[np.ndarray, np.ndarray],
    blocks: int,
    classes: int,
    unit: bool,
    rng: np.random.Generator,
) -> BlockMeans:
    """Return the means of random blocks of a site's pixels."""
    features, labels = site
    cells = labels * blocks + rng.integers(0, blocks, len(labels))
    parts = ClassStatistics.from_features(features, cells, classes * blocks, ignore_index=-1)
    shape = (classes, blocks)
    return BlockMeans(parts.count.reshape(shape), parts.mean.reshape(*shape, -1), unit)


def relative_error(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the relative Frobenius error (K,) of covariances (K, A, A)."""
    size = np.linalg.norm(expected, axis=(1, 2))
    return np.linalg.norm(found - expected, axis=(1, 2)) / size


if __name__ == "__main__":
    main(Path(sys.argv[1]))
