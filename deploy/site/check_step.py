"""Does a training step fit this device? Measured by doing one, at the size that the federation plans."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from clients.data.batches import max_micro_batches
from clients.out_of_memory import free_memory, unless_out_of_memory
from common.errors import fail
from common.networks import build_network
from common.settings.plan import Plan

WARM_STEPS = 1


@dataclass(frozen=True)
class Step:
    """What one training step cost.

    Attributes:
        seconds: Of the step after the first, which warms up.
        bytes: Largest memory of the device that was in use (GPU), or by how much the process grew (CPU).
        available: Memory of the device; 0 where it is not known (CPU).
        parts: Parts into which it was cut (`site.micro_batches`); more than planned where the memory asked for it.
    """

    seconds: float
    bytes: int
    available: int
    parts: int = 1


def measure_step(plan: Plan, device: torch.device) -> Step:
    """Do two steps with random slices of the plan's batch, size and network, and measure the second.

    A step that the memory does not hold is cut into parts, as training does. The supervised loss stands for all
    methods; the contrastive term adds a few per cent on top.

    Raises:
        FedsgcgError: SITE-502 when the device's memory does not hold a step in its smallest parts.
    """
    before, batch = _grown(), plan.method.batch_size
    most = max_micro_batches([batch])
    parts = min(plan.site.micro_batches, most)
    while (seconds := unless_out_of_memory(partial(_step_seconds, plan, device, parts))) is None:
        if parts == most:
            action = "lower network.base_width or data.image_size, or use a larger card"
            found = f"a step of {batch} slices of {plan.data.image_size} pixels in {parts} parts"
            raise fail(
                "SITE-502",
                where=str(device),
                found=found,
                expected="memory that holds it",
                action=action,
            )
        parts = min(2 * parts, most)
        free_memory(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Step(seconds, torch.cuda.max_memory_allocated(device), int(total), parts)
    return Step(seconds, max(0, _grown() - before), 0, parts)


def _step_seconds(plan: Plan, device: torch.device, parts: int) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(
            device
        )  # a step that did not fit says nothing about this one
    network = (
        build_network(plan.network, 3, plan.data.out_channels, generator_seed=0).to(device).train()
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    side, batch, seconds = plan.data.image_size, plan.method.batch_size, 0.0
    images, labels = (
        torch.zeros(batch, 3, side, side),
        torch.zeros(batch, side, side, dtype=torch.long),
    )
    images, labels = images.to(device), labels.to(device)
    for _ in range(WARM_STEPS + 1):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for some, truth in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            loss = functional.cross_entropy(network(some)[0].float(), truth)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - began
    return seconds


def _grown() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
