"""One training step (forward, both losses, backward, Adam) in channels-last and in NCHW order.

ours        as in `clients.training`: modules and images in channels-last memory contiguous  the
same modules and optimiser, everything in NCHW order published   as in RAM-DSIR's code: NCHW, 1 x 1
convolutions after the upsampling, Adam without fusion
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods import METHODS, Guidance
from fedsgcg.common.networks import DecoderBlock, build_network
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from tests.benchmarks.bench_amplitude import pictures
from tests.benchmarks.harness import at_least, one_thread, paired, ratio, row, show

B, SIDE = 4, 128
STEPS, SMALL_SIDE = 10, 64
PART = "training step"
KINDS = ("ours", "contiguous", "published")


def run() -> list[dict[str, Any]]:
    """Measure one size and return the rows."""
    plan = Plan.from_tree(
        compose(["method=sgcg", f"data.image_size={SIDE}", f"method.batch_size={B}", "device=cpu"])
    )
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # as set by `clients.device.choose_device` on a CPU
    try:
        with one_thread():
            return show(_rows(plan))
    finally:
        torch.use_deterministic_algorithms(before)


def _rows(plan: Plan) -> list[dict[str, Any]]:
    name = f"U-Net {plan.network.base_width}, B={B}, {plan.method.name}"
    times = paired({kind: make_step(plan, kind, SIDE) for kind in KINDS}, rounds=5)
    case = f"{name}, {SIDE} x {SIDE}"
    gains = {kind: ratio(times, kind, "ours") for kind in KINDS[1:]}
    rate = ratio({**times, "1": [1e3 * B] * len(times["ours"])}, "1", "ours")
    return [
        *(
            row(PART, case, f"{k} / ours", gain, "x", "≥ 1.15x", at_least(gain, 1.15))
            for k, gain in gains.items()
        ),
        row(PART, case, "ours", rate, "images/s"),
        *_differences(plan, f"{name}, {SMALL_SIDE} x {SMALL_SIDE}, {STEPS} steps"),
    ]


def _differences(plan: Plan, case: str) -> list[dict[str, Any]]:
    def losses(kind: str, dtype: torch.dtype, nudge: float = 0.0) -> np.ndarray:
        step = make_step(plan, kind, SMALL_SIDE, dtype, nudge)
        return np.array([step() for _ in range(STEPS)])

    exact = abs(losses("ours", torch.float64) - losses("contiguous", torch.float64)).max()
    plain = losses("contiguous", torch.float32)
    other = abs(losses("ours", torch.float32) - plain).max()
    itself = abs(
        losses("contiguous", torch.float32, nudge=torch.finfo(torch.float32).eps) - plain
    ).max()
    return [
        row(
            PART, case, "loss, contiguous - ours, float64", exact, "", "≤ 1e-4", bool(exact <= 1e-4)
        ),
        row(PART, case, "loss, contiguous - ours, float32", other, ""),
        row(PART, case, "loss, contiguous - itself after a nudge, float32", itself, ""),
    ]


def make_step(
    plan: Plan, kind: str, side: int, dtype: torch.dtype = torch.float32, nudge: float = 0.0
) -> Callable[[], float]:
    """Return a training step on a new network of the plan's seed; each call returns the loss."""
    order = torch.channels_last if kind == "ours" else torch.contiguous_format
    network = (
        build_network(plan.network, 3, plan.data.out_channels, plan.seed)
        .to(dtype, memory_format=order)
        .train()
    )
    if kind == "published":
        for block in network.decoder.blocks:
            block.__class__ = PublishedBlock
    optimizer = torch.optim.Adam(
        network.parameters(), lr=plan.method.learning_rate, fused=kind != "published"
    )
    images, labels, guidance = make_batch(plan, side)
    images = (images * (1 + nudge)).to(dtype).to(memory_format=order)
    method = METHODS[plan.method.name](network, plan, 1, torch.device("cpu"))
    batch = Batch(images, labels, (B,))

    def step() -> float:
        loss, _ = method.loss(batch, guidance)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


class PublishedBlock(DecoderBlock):
    """A decoder block with its 1 x 1 convolution after the upsampling."""

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        wide = functional.interpolate(
            self.reduce(features), scale_factor=2, mode="bilinear", align_corners=False
        )
        narrow = functional.relu(self.narrow_norm(self.narrow(wide)))
        return self.join(torch.cat([skip, narrow], dim=1))


def make_batch(plan: Plan, side: int, count: int = B) -> tuple[Tensor, Tensor, Guidance]:
    """Return images, labels by brightness (a quarter is foreground), and random prototypes."""
    K, A = plan.data.num_classes, plan.network.num_features
    images = pictures(count, side, side, seed=1)
    smooth = functional.avg_pool2d(images.mean(1), 9, stride=1, padding=4)
    labels = torch.bucketize(smooth, torch.quantile(smooth, torch.linspace(0.75, 0.95, K - 1)))
    rng = np.random.default_rng(0)
    features = np.abs(rng.normal(size=(400, A)))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    prototypes = ClassStatistics.from_features(features, rng.integers(0, K, 400), K)
    guidance = Guidance(
        mean=torch.tensor(prototypes.mean, dtype=torch.float32),
        covariance=torch.tensor(prototypes.covariance, dtype=torch.float32),
        active=torch.ones(K, dtype=torch.bool),
    )
    return images, labels, guidance
