"""A small study with fedsgcg's implementations and with the published ones in their place.

    published  einsum for the loss, one-hot moments as in ISDA, modules in NCHW order with 1 x 1
               convolutions after the upsampling, Adam without fusion, medpy for the distances
    ours       fedsgcg

Each run is a separate process on one thread; the kinds alternate. Measured is one cell of the
demonstration (three hospitals train three rounds, the fourth is evaluated) without imports, data
and report, by the process's CPU clock.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from tests.benchmarks import peers
from tests.benchmarks.harness import at_least, ratio, row, show

KINDS = ("published", "ours")
REPEATS = 3
SETTINGS = (
    "experiment=demo",
    "method=sgcg",
    "heldout=West",
    "federation.rounds=3",
    "runtime=inprocess",
    "device=cpu",
)
PART = "study, end to end"


def run() -> list[dict[str, Any]]:
    """Run both kinds in turn and return the ratio and the differences of the results."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _child_process("ours", Path(folder), "warm")  # writes the hospitals and their cache
        for repeat in range(REPEATS):
            for kind in KINDS:
                found[kind] = _child_process(kind, Path(folder), f"{kind}{repeat}")
                times[kind].append(found[kind]["cpu"])
    case = "demo, sgcg, West held out, 3 rounds"
    gain = ratio(times, "published", "ours")
    loss, dice = (abs(found["ours"][name] - found["published"][name]) for name in ("loss", "dice"))
    return show(
        [
            *(
                row(PART, case, f"CPU seconds, {kind}", statistics.median(times[kind]), "s")
                for kind in KINDS
            ),
            row(PART, case, "published / ours", gain, "x", "> 1", at_least(gain, 1.0)),
            row(
                PART, case, "difference of the first round's loss", loss, "", "≤ 1e-2", loss <= 1e-2
            ),
            row(PART, case, "difference of the held-out Dice", dice, ""),
        ]
    )


def _child_process(kind: str, folder: Path, name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_end_to_end", kind, str(folder), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=1800, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def _child(kind: str, folder: Path, name: str) -> dict[str, float]:
    from fedsgcg.deploy.study.plan import plan_study
    from fedsgcg.deploy.study.runtimes import run_cell_in_process

    if kind == "published":
        _swap_in_the_published_forms()
    output = folder / name
    (cell,) = plan_study([*SETTINGS, f"output={output}", f"site.cache={folder / 'cache'}"]).cells
    started_at = time.process_time()
    run_cell_in_process(cell.tree)
    seconds = time.process_time() - started_at
    return {"cpu": seconds, **_figures(Path(cell.tree["output"]))}


def _figures(folder: Path) -> dict[str, float]:
    """Return the mean loss of the first round, and the final mean Dice of the held-out hospital."""
    rounds = pq.read_table(folder / "rounds.parquet").to_pylist()
    losses = [line["value"] for line in rounds if line["round"] == 1 and line["metric"] == "loss"]
    cases = pq.read_table(folder / "results.parquet").to_pylist()
    return {
        "loss": statistics.fmean(losses),
        "dice": statistics.fmean(line["dice"] for line in cases),
    }


def _swap_in_the_published_forms() -> None:
    import fedsgcg.clients.evaluation
    import fedsgcg.clients.methods.class_statistics
    import fedsgcg.clients.methods.sgcg
    from fedsgcg.common.metrics import Metrics, segmentation_metrics
    from fedsgcg.common.networks import DecoderBlock
    from tests.benchmarks.bench_step import PublishedBlock

    def metrics(prediction: Any, truth: Any, spacing: Any = None) -> Metrics:
        if not (prediction.any() and truth.any()):  # medpy would raise
            return segmentation_metrics(prediction, truth, spacing)
        return peers.medpy_metrics(prediction, truth, spacing)

    torch.channels_last = torch.contiguous_format
    DecoderBlock.forward = PublishedBlock.forward
    torch.optim.Adam = _UnfusedAdam
    fedsgcg.clients.methods.sgcg.sgcg_loss = _einsum_loss
    fedsgcg.clients.methods.class_statistics.class_moments = _onehot_moments
    fedsgcg.clients.evaluation.segmentation_metrics = metrics


class _UnfusedAdam(torch.optim.Adam):
    def __init__(self, *groups: Any, fused: bool = False, **options: Any) -> None:
        super().__init__(*groups, **options)


def _einsum_loss(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    covariance: Tensor,
    *,
    temperature: float,
    active: Tensor,
    ignore_index: int,
    **options: Any,
) -> Tensor:
    """Compute the published form with the active pixels and classes."""
    number = torch.cumsum(active, 0) - 1
    kept = labels != ignore_index
    kept = kept & active[labels.where(kept, 0)]
    return peers.einsum_loss(
        features[kept],
        number[labels[kept]],
        mean[active],
        covariance[active],
        temperature=temperature,
    )


def _onehot_moments(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    kept = labels != ignore_index
    amount, mean, covariance = peers.onehot_moments(features[kept], labels[kept], num_classes)
    count = torch.bincount(labels[kept], minlength=num_classes)
    return count, mean, covariance * amount[:, None, None]


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
