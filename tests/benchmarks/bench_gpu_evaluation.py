"""Evaluation of volumes on a GPU, against one local epoch of as many patients."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.evaluation import evaluate_cases
from fedsgcg.clients.methods import Guidance
from fedsgcg.clients.training import train_round
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.networks import build_network
from tests.benchmarks.bench_gpu_step import plan_of
from tests.benchmarks.bench_step import make_batch
from tests.benchmarks.gpu_timing import Clock, Sizes, Times, gpu, middle
from tests.benchmarks.harness import at_least, ratio, row, show


def run(*, toy: bool = False) -> list[dict[str, Any]]:
    """Measure on the first CUDA device, or with `toy` on the CPU, and return the rows."""
    return show(evaluation(*gpu(toy)))


def evaluation(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Compare the evaluation of volumes with one local epoch of as many patients."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = (sizes.depth, sizes.side, sizes.side)
        write_hospitals(
            folder / "data", sites=("North", "South"), cases_per_site=sizes.volumes, shape=shape
        )
        plan = plan_of("ram_sgcg", sizes, f"data.root={folder / 'data'}", "method.local_epochs=1")
        opened = (open_site(folder / "data", site, plan.data) for site in ("North", "South"))
        training, test = (
            open_store(site, plan.data, folder / "cache", heldout=heldout)
            for site, heldout in zip(opened, (False, True), strict=True)
        )
        network = build_network(plan.network, 3, plan.data.out_channels, plan.seed).to(device)
        guide = make_batch(plan, sizes.side, sizes.batch)[2]
        guide = Guidance(
            *(getattr(guide, name).to(device) for name in ("mean", "covariance", "active"))
        )

        def epoch() -> None:
            train_round(network, [training], plan, round_number=1, guide=guide, device=device)

        work = {
            "epoch": epoch,
            "evaluation": lambda: evaluate_cases(network, [test], plan, "test", device),
        }
        times: Times = {name: [] for name in work}
        for kind, call in work.items():
            call()
            for _ in range(3):
                with Clock(device) as clock:
                    call()
                times[kind].append(clock.milliseconds / 1e3)
    part = "evaluation, GPU"
    case = f"{sizes.volumes} volumes of {sizes.depth} x {sizes.side} x {sizes.side}"
    gain = ratio(times, "epoch", "evaluation")
    return [
        row(part, case, "a local epoch / evaluation", gain, "x", "≥ 1x", at_least(gain, 1)),
        row(part, case, "a local epoch", middle(times, "epoch"), "s"),
        row(part, case, "evaluation", middle(times, "evaluation"), "s"),
    ]
