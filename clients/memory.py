"""When a batch does not fit a card: the same step in halves or quarters, with the same effective batch.

The gradients of the parts are added up, each weighted with its share of the batch, so that a step learns from the same
slices. BatchNorm sees the smaller parts and normalises by them: the model is then not bit for bit the one of a larger
card, which is why every halving is told (`halvings` of the round's figures, and the site's log).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from common.errors import fail

LOG = logging.getLogger("fedsgcg.site")
MOST_HALVINGS = 2

T = TypeVar("T")


def fitting(step: Callable[[int], T], halvings: int = 0, most: int = MOST_HALVINGS) -> tuple[T, int]:
    """Do one training step in as few parts as fit the device's memory.

    Args:
        step: Does the whole step in so many parts (1, 2 or 4) and returns its result. It is called again after it ran
            out of memory, so it must begin with `zero_grad` and change weights only at its end.
        halvings: How often the batch is halved already, from the steps before.
        most: How often it may be.

    Returns:
        The result, and how often the batch is halved now.

    Raises:
        FedsgcgError: SITE-502 when even the smallest part does not fit.
    """
    while True:
        try:
            return step(2**halvings), halvings
        except torch.OutOfMemoryError as error:
            if halvings >= most:
                raise fail(
                    "SITE-502",
                    found=f"no room for a batch in {2**halvings} parts: {str(error).partition('. ')[0]}",
                    expected="a step that fits",
                    action="lower method.batch_size, network.base_width or data.image_size, or use a larger card",
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halvings += 1
        LOG.warning("site.memory the device is full: a batch now goes in %d parts", 2**halvings)


def parts_of(images: Tensor, labels: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Cut a batch: yields images (B', C, H, W), labels (B', H, W) and the share B'/B; no part is smaller than two.

    A part of one slice would leave BatchNorm nothing to normalise by, so a small batch is cut into fewer parts.
    """
    parts = max(1, min(parts, len(images) // 2))
    for some, truth in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
        yield some, truth, len(some) / len(images)
