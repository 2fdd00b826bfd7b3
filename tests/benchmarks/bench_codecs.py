"""`federation.codec`: bytes of a trained U-Net's reply, and the CPU time of coding and decoding it.

The differences are those of Adam's steps at the default rate on synthetic slices, from new weights:
the largest that a federation sees. Later rounds, with a lower rate, are smaller. `entropy` is the
least that any code of single differences can take.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedsgcg.clients.training import weights_of
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.codecs import _ordered, decode_values, encode_rounded, encode_values
from tests.benchmarks.harness import one_thread, row, show

STEPS = 25
MIB = 2**20

Floats = npt.NDArray[np.float32]


def run() -> list[dict[str, Any]]:
    """Measure and return the rows."""
    with one_thread():
        reference, values = _before_and_after()
    case = f"U-Net 16, {values.size / 1e6:.1f} M values, after {STEPS} steps"
    raw = values.nbytes / MIB
    rows = [row("codec", case, "none, size", raw, "MiB")]
    coded, seconds = _timed(lambda: encode_values(values, reference))
    _, reading = _timed(lambda: decode_values(coded, reference, "lossless"))
    size = len(coded) / MIB
    rows += [
        row("codec", case, "lossless, size", size, "MiB", "≤ 8.4", size <= 8.4),
        row("codec", case, "lossless, entropy", _entropy(values, reference) / MIB, "MiB"),
        row("codec", case, "lossless, coding", seconds, "s"),
        row("codec", case, "lossless, decoding", reading, "s"),
    ]
    (rounded, _, _), seconds = _timed(lambda: encode_rounded(values, reference, None))
    size = len(rounded) / MIB
    rows += [
        row("codec", case, "bf16, size", size, "MiB", "≤ 4.3", size <= 4.3),
        row("codec", case, "bf16, coding", seconds, "s"),
    ]
    return show(rows)


def _before_and_after() -> tuple[Floats, Floats]:
    plan = Plan.from_tree(compose(["network.base_width=16", "data.image_size=64"]))
    network = build_network(plan.network, 3, plan.data.out_channels, 0).train()
    reference = weights_of(network).values.copy()
    optimizer = torch.optim.Adam(network.parameters(), lr=plan.method.learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        images = torch.rand(plan.method.batch_size, 3, 64, 64, generator=generator)
        labels = (images[:, 0] > 0.5).long()
        optimizer.zero_grad()
        logits, _ = network(images)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    return reference, weights_of(network).values.copy()


def _timed(work: Any, repeats: int = 5) -> tuple[Any, float]:
    found = work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return found, float(np.median(times))


def _entropy(values: Floats, reference: Floats) -> float:
    """Return bytes: entropy of the differences' lengths in bits, and their bits below the first."""
    difference = (_ordered(values) - _ordered(reference)).view(np.int32).astype(np.int64)
    lengths = np.ceil(np.log2(np.abs(difference) + 1.0)).astype(int)
    shares = np.bincount(lengths) / lengths.size
    shares = shares[shares > 0]
    below = np.maximum(lengths, 0).mean()  # the sign and the bits below the first
    return float((below - (shares * np.log2(shares)).sum()) * lengths.size / 8)
