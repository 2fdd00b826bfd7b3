"""The segmentation network: the U-Net of RAM-DSIR (methods.md 2.2), base width and normalisation configurable.

Legend: B batch, C output channels, H, W height and width (multiples of 16), w base width (16 in RAM-DSIR),
A = 2w channels of the penultimate map, the representation that class statistics and SgCG loss describe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.plan import NetworkSettings

DOWNSAMPLING: Final = 16
"""Height and width must be multiples of this: four poolings by two."""

GROUPS: Final = 8
"""Groups of `norm="group"`, fewer where the channels do not divide by it."""

NORMS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(GROUPS, channels), channels),
    # One group a channel is instance normalisation; unlike InstanceNorm2d it accepts the 1 x 1 map of a 16 x 16 image.
    "instance": lambda channels: nn.GroupNorm(channels, channels),
}


class UNet(nn.Module):
    """The RAM-DSIR U-Net: encoder with 1 967 904 and decoder with 1 217 362 parameters at base width 16.

    Args:
        in_channels: Channels of an image.
        out_channels: C, channels of the logits.
        base_width: w, channels of the first block.
        norm: `batch`, `group` or `instance`.

    Raises:
        ValueError: An unknown norm, or a width that is not a positive even number.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 2, base_width: int = 16, norm: str = "batch") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm: found {norm!r}, expected one of {sorted(NORMS)}")
        if base_width < 2 or base_width % 2:
            raise ValueError(f"base_width: found {base_width}, expected a positive even number")
        widths = [base_width << level for level in range(5)]
        self.encoder = Encoder(in_channels, widths, NORMS[norm])
        self.decoder = Decoder(out_channels, widths, NORMS[norm])
        initialise(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Segment a batch.

        Args:
            images: (B, in_channels, H, W).

        Returns:
            Logits (B, C, H, W) and the penultimate map (B, 2w, H, W), which is not negative.

        Raises:
            ValueError: H or W that is not a multiple of 16.
        """
        if images.ndim != 4 or images.shape[2] % DOWNSAMPLING or images.shape[3] % DOWNSAMPLING:
            raise ValueError(
                f"images: found shape {tuple(images.shape)}, expected (B, C, H, W) with H and W multiples of 16"
            )
        logits, penultimate = self.decoder(self.encoder(images))
        return logits, penultimate


class Encoder(nn.Module):
    """Five blocks at strides 1 to 16; returns the map of each."""

    def __init__(self, in_channels: int, widths: list[int], norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _encoder_block(before, after, norm) for before, after in zip([in_channels, *widths], widths, strict=False)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return five maps, (B, w, H, W) to (B, 16w, H/16, W/16)."""
        maps: list[Tensor] = []
        for block in self.blocks:
            maps.append(block(functional.max_pool2d(maps[-1], 2) if maps else images))
        return maps


class Decoder(nn.Module):
    """Four blocks back to full resolution, and the output convolution."""

    def __init__(self, out_channels: int, widths: list[int], norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        planes = widths[:0:-1]
        self.blocks = nn.ModuleList(DecoderBlock(p, norm, reduce=level > 0) for level, p in enumerate(planes))
        self.head = nn.Conv2d(planes[-1], out_channels, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Turn the encoder's maps into logits (B, C, H, W) and the penultimate map (B, 2w, H, W)."""
        features = maps[-1]
        for block, skip in zip(self.blocks, maps[-2::-1], strict=True):
            features = block(features, skip)
        return self.head(features), features


class DecoderBlock(nn.Module):
    """[conv3x3 2p -> p], bilinear x2, conv1x1 p -> p/2, joined with the skip of p/2, conv3x3 p -> p."""

    def __init__(self, planes: int, norm: Callable[[int], nn.Module], *, reduce: bool) -> None:
        super().__init__()
        self.reduce = _conv_norm(2 * planes, planes, norm) if reduce else nn.Identity()
        self.narrow = nn.Conv2d(planes, planes // 2, 1)
        self.narrow_norm = norm(planes // 2)
        self.join = _conv_norm(planes, planes, norm)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Bring features to twice their size (B, p, 2h, 2w) with the help of skip (B, p/2, 2h, 2w)."""
        # 1 x 1 convolution and interpolation (weights that sum to one) commute: the same map for a quarter of the work.
        narrow = self.narrow(self.reduce(features))
        wide = functional.interpolate(narrow, scale_factor=2, mode="bilinear", align_corners=False)
        joined: Tensor = self.join(torch.cat([skip, functional.relu(self.narrow_norm(wide))], dim=1))
        return joined


def initialise(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw all weights anew: kaiming-normal (fan-out) convolutions, zero biases, unit norms (methods.md 2.2).

    Args:
        network: Changed in place.
        generator: Source of randomness; None draws from torch's global one.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            module.reset_parameters()


def build_network(
    settings: NetworkSettings, in_channels: int, out_channels: int, generator_seed: int | None
) -> nn.Module:
    """Build a network whose weights depend on the seed alone; torch's global random state is left untouched.

    Args:
        settings: Name, base width and norm.
        in_channels: Channels of an image.
        out_channels: Channels of the logits.
        generator_seed: Seed of the initialisation, e.g. `common.seeding.stream_seed(seed, "weights")`; None leaves the
            weights undefined, for a caller that loads all of them (the draws cost more than the loading).

    Raises:
        ValueError: A name that `NETWORKS` does not hold.
    """
    if settings.name not in NETWORKS:
        raise ValueError(f"name: found {settings.name!r}, expected one of {sorted(NETWORKS)}")
    with torch.device("meta"):  # shapes only: the constructors of torch's layers would draw from the global generator
        network = NETWORKS[settings.name](in_channels, out_channels, settings.base_width, settings.norm)
    network.to_empty(device="cpu")
    if generator_seed is not None:
        initialise(network, torch.Generator().manual_seed(generator_seed))
    return network


def _encoder_block(before: int, after: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    entry = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), norm(after))  # no ReLU here: as RAM-DSIR has it
    return nn.Sequential(entry, _conv_norm(after, after, norm), _conv_norm(after, after, norm))


def _conv_norm(before: int, after: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), norm(after), nn.ReLU(inplace=True))


NETWORKS: Final[dict[str, Callable[[int, int, int, str], nn.Module]]] = {"unet": UNet}
"""Networks by name; each is built from (in_channels, out_channels, base_width, norm)."""
