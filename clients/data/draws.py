"""Random numbers for each slice of a batch, on its device."""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """Draws random numbers for every slice of a batch.

    Args:
        count: B, slices of the batch.
        device: Device of the numbers.
        generator: Random generator on the device.
    """

    def __init__(self, count: int, device: torch.device, generator: torch.Generator) -> None:
        self.count = count
        self.device = device
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return (B, *shape) numbers in [low, high)."""
        numbers = torch.rand(self.count, *shape, device=self.device, generator=self.generator)
        return numbers * (high - low) + low

    def around_one(self, low: float, high: float) -> Tensor:
        """Return (B,) numbers, half of them in [low, 1), the others in [1, high)."""
        below = self.uniform(0, 1) < 0.5
        return torch.where(below, self.uniform(low, 1), self.uniform(1, high))

    def normal(self, *shape: int) -> Tensor:
        """Return (B, *shape) standard normal numbers."""
        return torch.randn(self.count, *shape, device=self.device, generator=self.generator)
