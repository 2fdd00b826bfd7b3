"""Does a training step fit this device? Measured by doing one, at the size that the federation plans."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch
from torch.nn import functional

from common.errors import fail
from common.networks import build_network
from common.plan import Plan

WARM_STEPS = 1


@dataclass(frozen=True)
class Step:
    """What one training step cost.

    Attributes:
        seconds: Of the step after the first, which warms up.
        bytes: Largest memory of the device that was in use (GPU), or by how much the process grew (CPU).
        available: Memory of the device; 0 where it is not known (CPU).
    """

    seconds: float
    bytes: int
    available: int


def measure_step(plan: Plan, device: torch.device) -> Step:
    """Do two steps with random slices of the plan's batch, size and network, and measure the second.

    The supervised loss stands for all methods; the contrastive term adds a few per cent on top.

    Raises:
        FedsgcgError: SITE-502 when the device's memory is too small.
    """
    before = _grown()
    try:
        network = build_network(plan.network, 3, plan.data.out_channels, generator_seed=0).to(device).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        side, batch = plan.data.image_size, plan.method.batch_size
        images, labels = torch.zeros(batch, 3, side, side), torch.zeros(batch, side, side, dtype=torch.long)
        images, labels = images.to(device), labels.to(device)
        for _ in range(WARM_STEPS + 1):
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(network(images)[0].float(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()  # waits for the device
            seconds = time.perf_counter() - began
    except torch.OutOfMemoryError as error:
        action = "lower method.batch_size, network.base_width or data.image_size, or use a larger card"
        raise fail("SITE-502", where=str(device), found=str(error).split(". ")[0], action=action) from error
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Step(seconds, torch.cuda.max_memory_allocated(device), int(total))
    return Step(seconds, max(0, _grown() - before), 0)


def _grown() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
