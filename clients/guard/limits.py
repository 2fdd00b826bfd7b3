"""The site's own limits on disk, memory and time (`max_…` of `site.yaml`).

The program bounds every setting too (`common.settings.base.at_most`), but only the site knows its
machine. A request beyond a limit is refused before a file is read or a network is built.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from fedsgcg.clients.data.cache import BEYOND, GIGA, UNLIMITED, Budget
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import Problem
from fedsgcg.common.settings.plan import Plan

BYTES_PER_VALUE: Final = 200
"""Memory of a training step per pixel, slice and channel of the first block.

About fifty float32 feature maps of the first block's width: forward and backward values of the two
outer blocks, and as much again for all inner ones. Measured on a CPU: 186 bytes.
"""

PAIRS: Final = 1.5
"""Factor of a step that also encodes two images of a pair for each slice; measured: 1.4."""

SHARE_OF_MEMORY: Final = 0.75


def beyond_limits(plan: Plan, policy: SiteFile) -> Iterator[Problem]:
    """Yield a problem for every setting that exceeds a limit of the site."""
    method = plan.method
    batch = sum(method.batch_per_domain) or method.batch_size
    asked: tuple[tuple[str, float, str], ...] = (
        ("data.image_size", plan.data.image_size, "max_image_size"),
        ("method.batch_size", batch, "max_batch_size"),
        ("method.local_epochs", method.local_epochs, "max_epochs"),
        ("method.steps_per_round", method.steps_per_round, "max_steps"),
        ("federation.rounds", plan.federation.rounds, "max_rounds"),
    )
    for name, value, limit in asked:
        most = getattr(policy, limit)
        if value > most:
            yield _problem(name, f"{value:g}", f"{most:g}", limit)
    needed, most = step_bytes(plan, batch), memory_bytes(policy)
    if needed > most and not _on_gpu(policy):
        found = f"a training step of about {needed / GIGA:.1f} GB"
        where = "data.image_size, method.batch_size, network.base_width"
        yield _problem(where, found, f"{most / GIGA:.1f} GB", "max_memory_gb")


def step_bytes(plan: Plan, batch: int) -> int:
    """Return an estimate of the memory of a training step with `batch` slices of the U-Net."""
    values = batch * plan.data.image_size**2 * plan.network.base_width
    views = PAIRS if plan.method.pairs else 1.0
    return int(BYTES_PER_VALUE * values * views) // plan.site.micro_batches


def memory_bytes(policy: SiteFile) -> float:
    """Return the site's memory limit in bytes."""
    if policy.max_memory_gb > 0:
        return policy.max_memory_gb * GIGA
    return SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def budget_of(policy: SiteFile | None) -> Budget:
    """Return the disk and memory for the conversion of images; unlimited in a simulation."""
    if policy is None:
        return UNLIMITED
    return Budget(policy.max_cache_gb * GIGA, memory_bytes(policy))


def _on_gpu(policy: SiteFile) -> bool:
    """Whether the site trains on a GPU, where a step that does not fit is split."""
    if policy.device != "auto":
        return policy.device.startswith("cuda")
    import torch  # a policy is also read by programs without torch

    return torch.cuda.is_available()


def _problem(name: str, found: str, most: str, limit: str) -> Problem:
    action = f"lower the setting, or have the site raise {limit} in its site.yaml"
    return Problem(BEYOND, found, f"at most {most} ({limit} of site.yaml)", action, name)
