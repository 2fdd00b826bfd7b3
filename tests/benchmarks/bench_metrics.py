"""Dice and surface distances of two star-shaped masks, against medpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedsgcg.common.metrics import segmentation_metrics
from tests.benchmarks import peers
from tests.benchmarks.harness import at_least, one_thread, paired, ratio, row, show

PART = "segmentation_metrics"


def run() -> list[dict[str, Any]]:
    """Measure 2-D masks of three sizes and a volume, and return the rows."""
    with one_thread():
        planes = [
            line
            for side in (256, 384, 800)
            for line in _case(f"{side} x {side}", star(side, 1), star(side, 2), side == 800)
        ]
        return show(planes + _case("32 x 128 x 128", volume(1), volume(2), judged=False))


def star(side: int, seed: int) -> np.ndarray:
    """Return a star-shaped mask with a radius of about 20 % of the side."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - side / 2 - rng.uniform(-0.01, 0.01) * side
    angle = np.arctan2(y, x)
    waves = sum(rng.normal() * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
    return np.hypot(y, x) < 0.2 * side * (1 + 0.08 * waves)


def volume(seed: int) -> np.ndarray:
    """Return a star that shrinks towards the end slices."""
    plane = star(128, seed)
    return np.stack(
        [
            plane & (np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 3.5 * min(z, 31 - z))
            for z in range(32)
        ]
    )


def _case(
    case: str, prediction: np.ndarray, truth: np.ndarray, judged: bool
) -> list[dict[str, Any]]:
    times = paired(
        {
            "ours": lambda: segmentation_metrics(prediction, truth),
            "medpy one": lambda: peers.medpy_dice_and_asd(prediction, truth),
            "medpy four": lambda: peers.medpy_four(prediction, truth),
        }
    )
    one, four = ratio(times, "medpy one", "ours"), ratio(times, "medpy four", "ours")
    found = segmentation_metrics(prediction, truth)
    theirs = peers.medpy_four(prediction, truth)
    gap = max(
        abs(a - b)
        for a, b in zip((found.dice, found.asd, found.asd_reverse, found.assd), theirs, strict=True)
    )
    return [
        row(
            PART,
            case,
            "medpy dice+asd / ours (all)",
            one,
            "x",
            *(("≥ 8x", at_least(one, 8)) if judged else ()),
        ),
        row(
            PART,
            case,
            "medpy all four / ours (all)",
            four,
            "x",
            *(("≥ 30x", at_least(four, 30)) if judged else ()),
        ),
        row(PART, case, "largest difference from medpy", gap, "", "≤ 1e-10", gap <= 1e-10),
        row(
            PART, case, "ours", ratio({**times, "1": [1.0] * len(times["ours"])}, "ours", "1"), "ms"
        ),
    ]
