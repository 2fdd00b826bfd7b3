"""Class moments of a batch against ISDA's and a bare float64 X'X; accuracy of many merges."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedsgcg.common.sgcg.loss import class_moments
from fedsgcg.common.statistics import ClassStatistics
from tests.benchmarks import peers
from tests.benchmarks.harness import at_least, extra_memory, one_thread, paired, ratio, row, show

CASES = ((65536, 32, 3), (65536, 64, 3), (65536, 64, 19), (16384, 256, 3), (65536, 256, 3))
MERGES = 6000
SITES = 6
PIXELS = 256
CHANNELS = 8
PART = "class_moments"


def run() -> list[dict[str, Any]]:
    """Measure every case and return the rows."""
    with one_thread():
        return show(
            [line for case in CASES for line in _case(*case)] + _batch_error() + _merge_error()
        )


def _case(N: int, A: int, K: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, A, generator=generator)
    labels = torch.randint(0, K, (N,), generator=generator)
    exact = features.double()
    variants = {
        "ours": lambda: class_moments(features, labels, K),
        "onehot": lambda: peers.onehot_moments(features, labels, K),
        "gram": lambda: exact.T @ exact,
    }
    times = paired(variants)
    case = f"N={N} A={A} K={K}"
    isda = ratio(times, "onehot", "ours")
    share = ratio(times, "gram", "ours")
    memory = extra_memory(variants["ours"])
    wanted = {(64, 19): 25.0, (64, 3): 4.0}.get((A, K))
    return [
        row(PART, case, "ISDA's form / ours", isda, "x", *_judged(isda, wanted)),
        row(
            PART,
            case,
            "share of one float64 X'X",
            share,
            "",
            *_judged(share, 0.65 if A >= 256 else None),
        ),
        row(PART, case, "extra memory", memory, "MiB", "≤ 32 MiB", memory <= 32),
    ]


def _judged(value: tuple[float, float, float], target: float | None) -> tuple[str, bool | None]:
    return ("", None) if target is None else (f"≥ {target:g}", at_least(value, target))


def _batch_error() -> list[dict[str, Any]]:
    """Return the relative Frobenius error for a mean 1e5 standard deviations from the origin."""
    rng = np.random.default_rng(0)
    features = (1e3 + 1e-2 * rng.standard_normal((65536, 32))).astype(np.float32)
    labels = rng.integers(0, 3, len(features))
    _, _, scatter = class_moments(torch.from_numpy(features), torch.from_numpy(labels), 3)
    exact = np.stack([_scatter(features[labels == k].astype(np.float64)) for k in range(3)])
    error = _relative(scatter.numpy(), exact)
    return [row(PART, "mean 1e3, std 1e-2", "relative error", error, "", "≤ 1e-8", error <= 1e-8)]


def _merge_error() -> list[dict[str, Any]]:
    """Merge thousands of site-rounds one by one; compare with pooling in extended precision."""
    rng = np.random.default_rng(1)
    means = 1e3 + 1e-2 * rng.standard_normal((SITES, CHANNELS))
    state = ClassStatistics.empty(1, CHANNELS)
    total, outer = np.zeros(CHANNELS, np.longdouble), np.zeros((CHANNELS, CHANNELS), np.longdouble)
    for merge in range(MERGES):
        features = means[merge % SITES] + 1e-2 * rng.standard_normal((PIXELS, CHANNELS))
        state = state + ClassStatistics.from_features(features, np.zeros(PIXELS, np.int64), 1)
        shifted = features.astype(np.longdouble) - 1000
        total += shifted.sum(0)
        outer += shifted.T @ shifted
    n = MERGES * PIXELS
    exact = (outer - np.multiply.outer(total, total) / n).astype(np.float64)
    error = _relative(state.scatter[0], exact)
    least = float(np.linalg.eigvalsh(state.scatter[0])[0])
    uneven = int((state.scatter != state.scatter.transpose(0, 2, 1)).sum())
    part, case = "merge", f"{MERGES} site-rounds, mean 1e3, std 1e-2"
    return [
        row(part, case, "relative error", error, "", "≤ 1e-8", error <= 1e-8),
        row(
            part,
            case,
            "smallest eigenvalue / trace",
            least / np.trace(exact),
            "",
            "≥ -1e-12",
            least >= -1e-12 * np.trace(exact),
        ),
        row(part, case, "asymmetric entries", float(uneven), "", "0", uneven == 0),
    ]


def _scatter(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(0)
    return centred.T @ centred


def _relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
