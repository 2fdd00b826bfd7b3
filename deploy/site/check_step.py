"""Measures whether a training step of the federation's size fits this device, by running one."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from fedsgcg.clients.data.batches import max_micro_batches
from fedsgcg.clients.out_of_memory import free_memory, unless_out_of_memory
from fedsgcg.common.errors import fail
from fedsgcg.common.networks import UNet, build_network
from fedsgcg.common.settings.plan import Plan

WARM_STEPS = 1


@dataclass(frozen=True)
class Step:
    """Cost of one training step.

    Attributes:
        seconds: Duration of the step after the warm-up step.
        bytes: Peak memory use of the device (GPU), or growth of the process (CPU).
        available: Memory of the device; 0 when unknown (CPU).
        parts: Micro-batches of the step; more than `site.micro_batches` if the batch did not fit
            into memory.
    """

    seconds: float
    bytes: int
    available: int
    parts: int = 1


def measure_step(plan: Plan, device: torch.device) -> Step:
    """Run two steps with empty slices of the plan's batch size, image size and network.

    The second step is measured. A batch that does not fit into memory is split, as in training. The
    supervised loss represents all methods; the contrastive term adds a few per cent.

    Raises:
        FedsgcgError: SITE-502 when even the smallest micro-batch does not fit into memory.
    """
    before = _peak_size()
    batch = plan.method.batch_size
    most = max_micro_batches([batch])
    parts = min(plan.site.micro_batches, most)
    while (seconds := unless_out_of_memory(partial(_step_seconds, plan, device, parts))) is None:
        if parts == most:
            action = "lower network.base_width or data.image_size, or use a larger GPU"
            found = f"a step of {batch} slices of {plan.data.image_size} pixels in {parts} parts"
            raise fail(
                "SITE-502",
                where=str(device),
                found=found,
                expected="enough memory for it",
                action=action,
            )
        parts = min(2 * parts, most)
        free_memory(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Step(seconds, torch.cuda.max_memory_allocated(device), int(total), parts)
    return Step(seconds, max(0, _peak_size() - before), 0, parts)


def _step_seconds(plan: Plan, device: torch.device, parts: int) -> float:
    if device.type == "cuda":
        # The peak of an earlier step that did not fit must not count.
        torch.cuda.reset_peak_memory_stats(device)
    network = build_network(plan.network, 3, plan.data.out_channels, generator_seed=0)
    network = network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    side = plan.data.image_size
    batch = plan.method.batch_size
    images = torch.zeros(batch, 3, side, side).to(device)
    labels = torch.zeros(batch, side, side, dtype=torch.long).to(device)
    seconds = 0.0
    for _ in range(WARM_STEPS + 1):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for some, truth in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            loss = functional.cross_entropy(network(some)[0].float(), truth)
            if plan.method.pairs and isinstance(network, UNet):
                loss = loss + network.encode(torch.cat([some, some]))[-1].float().mean()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
    return seconds


def _peak_size() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
