"""How far the inversion of a gradient gets, from the easiest case to the U-Net.

    python -m tests.benchmarks.gradient_inversion

The slice is a smooth random image of 16 x 16 pixels (the U-Net: 32 x 32) whose mask says nothing
about it, so that a correlation can only come from the gradient. Every network is untrained.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.attacks.inversion import invert_gradient
from fedsgcg.deploy.attacks.patients import Patient
from tests.support.plans import small_plan

WIDTH = 64


class Convolutions(nn.Module):
    """Convolutions at full resolution; logits and features, like the U-Net.

    Args:
        depth: Hidden layers.
        norm: Whether they have group normalisation.
        pool: Whether a branch at half the resolution is joined.
    """

    def __init__(self, depth: int = 1, *, norm: bool = False, pool: bool = False) -> None:
        super().__init__()

        def layer(before: int, after: int) -> nn.Sequential:
            normed = nn.GroupNorm(8, after) if norm else nn.Identity()
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), normed, nn.ReLU())

        widths = [3, *[WIDTH] * depth]
        self.layers = nn.Sequential(*map(layer, widths, widths[1:]))
        self.lower = layer(WIDTH, WIDTH) if pool else None
        self.out = nn.Conv2d(2 * WIDTH if pool else WIDTH, 2, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, 2, H, W) and features."""
        maps = self.layers(images)
        if self.lower is not None:
            low = self.lower(functional.max_pool2d(maps, 2))
            maps = torch.cat([maps, functional.interpolate(low, scale_factor=2.0)], dim=1)
        return self.out(maps), maps


def patient(side: int = 16, seed: int = 5) -> Patient:
    """Return a patient with one smooth random slice of three channels, and a square mask."""
    rng = torch.Generator().manual_seed(seed)
    rough = torch.randn((1, 3, side + 8, side + 8), generator=rng)
    smooth = functional.avg_pool2d(rough, 9, stride=1)
    labels = torch.zeros((1, side, side), dtype=torch.long)
    labels[:, 4:10, 3:9] = 1
    return Patient("A", True, smooth / smooth.abs().max(), labels)


def made(depth: int = 1, *, norm: bool = False, pool: bool = False) -> nn.Module:
    """Return an untrained network, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Convolutions(depth, norm=norm, pool=pool)


def group_plan(folder: Path) -> Plan:
    """Return a plan of the U-Net with group normalisation, base width 4."""
    return small_plan(folder, network__norm="group")


def main() -> None:
    """Print a line for each network."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plan = group_plan(Path(folder))
    small, large = patient(), patient(32)
    unet = build_network(plan.network, 3, plan.data.out_channels, 0).eval()
    cases = [
        ("one hidden layer", made(), small),
        ("one hidden layer, group norm", made(norm=True), small),
        ("one hidden layer, a branch after pooling", made(pool=True), small),
        ("two hidden layers", made(2), small),
        ("three hidden layers", made(3), small),
        ("three hidden layers, group norm", made(3, norm=True), small),
        ("U-Net, base width 4", unet, large),
    ]
    for name, network, own in cases:
        start = time.process_time()
        found = invert_gradient(network, own, [], plan)
        seconds = time.process_time() - start
        print(f"{name}: correlation {found.correlation:.2f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
