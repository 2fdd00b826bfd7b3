"""The U-Net of RAM-DSIR with configurable width and normalisation, and networks by import path.

Also DSIR's restoration decoder, which is used only in training and never leaves a client. The
architecture is described in docs/explanation/ram-dsir.md, "Network".

Legend: B batch, C output channels, D source domains, H, W height and width (multiples of 16), w
base width (16 in RAM-DSIR), A channels of the feature map that class statistics and SgCG loss
describe: 2w at full resolution for the penultimate map, A' for a projection of it, 16w at 1/16 of
the resolution for the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fedsgcg.common.domain_pool import DomainKnowledge
from fedsgcg.common.settings.data import channels_of
from fedsgcg.common.settings.own_code import load_class, unusable
from fedsgcg.common.settings.plan import NetworkSettings

DOWNSAMPLING: Final = 16
"""Height and width must be multiples of this: four poolings by two."""

IN_CHANNELS: Final = 3
"""Channels of an image: a slice with its neighbours, a repeated slice, or a picture's colours.

With `data.stack=5` there are five (`common.settings.data.channels_of`).
"""

GROUPS: Final = 8
"""Groups of `norm="group"`, fewer if the number of channels is not a multiple."""

FEATURES: Final = ("penultimate", "projection", "bottleneck")

NORMS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(GROUPS, channels), channels),
    # One group per channel is instance normalisation. Unlike InstanceNorm2d it accepts the 1 x 1
    # map of a 16 x 16 image.
    "instance": lambda channels: nn.GroupNorm(channels, channels),
}


class UNet(nn.Module):
    """The RAM-DSIR U-Net.

    At base width 16 the encoder has 1 967 904 and the decoder 1 217 362 parameters.

    Args:
        in_channels: Channels of an image.
        out_channels: C, channels of the logits.
        base_width: w, channels of the first block.
        norm: `batch`, `group` or `instance`.
        features: The feature map to return: `penultimate`, `projection` or `bottleneck`.
        projection: A' of `features="projection"`.
        domains: Places of DoFE's pool of domain knowledge (`common.domain_pool`); 0 = none.
        stride: s, distance of the projected pixels in a row and a column.

    Raises:
        ValueError: An unknown norm or feature map, or a width that is not a positive even number.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 2,
        base_width: int = 16,
        norm: str = "batch",
        features: str = "penultimate",
        projection: int = 32,
        domains: int = 0,
        stride: int = 1,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm: found {norm!r}, expected one of {sorted(NORMS)}")
        if features not in FEATURES:
            raise ValueError(f"features: found {features!r}, expected one of {FEATURES}")
        if base_width < 2 or base_width % 2:
            raise ValueError(f"base_width: found {base_width}, expected a positive even number")
        widths = [base_width << level for level in range(5)]
        self.features = features
        self.encoder = Encoder(in_channels, widths, NORMS[norm])
        self.decoder = Decoder(out_channels, widths, NORMS[norm])
        if features == "projection":
            self.projection = projection_head(widths[1], projection, NORMS[norm], stride)
        self.knowledge = DomainKnowledge(domains, widths[1]) if domains else None
        initialise(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Segment a batch.

        Args:
            images: (B, in_channels, H, W).

        Returns:
            Logits (B, C, H, W) and the feature map: penultimate (B, 2w, H, W), which is not
            negative, its projection (B, A', H/s, W/s), or the bottleneck (B, 16w, H/16, W/16).

        Raises:
            ValueError: H or W is not a multiple of 16.
        """
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the encoder's five maps of images (B, in_channels, H, W); DSIR uses the last."""
        if images.ndim != 4 or images.shape[2] % DOWNSAMPLING or images.shape[3] % DOWNSAMPLING:
            raise ValueError(
                f"images: found shape {tuple(images.shape)}, "
                f"expected (B, C, H, W) with H and W multiples of {DOWNSAMPLING}"
            )
        maps: list[Tensor] = self.encoder(images)
        return maps

    def decode(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits and feature map of an encoding."""
        logits, penultimate = self.decoder(maps, self.knowledge)
        if self.features == "bottleneck":
            return logits, maps[-1]
        if self.features == "projection":
            return logits, self.projection(penultimate)
        return logits, penultimate


class Encoder(nn.Module):
    """Five blocks at strides 1 to 16; returns the map of each."""

    def __init__(
        self, in_channels: int, widths: list[int], norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _encoder_block(before, after, norm)
            for before, after in zip([in_channels, *widths], widths, strict=False)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return five maps, (B, w, H, W) to (B, 16w, H/16, W/16)."""
        maps: list[Tensor] = []
        for block in self.blocks:
            maps.append(block(functional.max_pool2d(maps[-1], 2) if maps else images))
        return maps


class Decoder(nn.Module):
    """Four blocks back to full resolution, and the output convolution."""

    def __init__(
        self, out_channels: int, widths: list[int], norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        planes = widths[:0:-1]
        self.blocks = nn.ModuleList(
            DecoderBlock(p, norm, reduce=level > 0) for level, p in enumerate(planes)
        )
        self.head = nn.Conv2d(planes[-1], out_channels, 3, padding=1)

    def forward(
        self, maps: list[Tensor], knowledge: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (B, C, H, W) and the penultimate map (B, 2w, H, W).

        With `knowledge` the logits are those of its output, and the map is its input.
        """
        features = maps[-1]
        for block, skip in zip(self.blocks, maps[-2::-1], strict=True):
            features = block(features, skip)
        return self.head(features if knowledge is None else knowledge(features)), features


class DecoderBlock(nn.Module):
    """[conv3x3 2p -> p], bilinear x2, conv1x1 p -> p/2, skip of p/2 joined, conv3x3 p -> p."""

    def __init__(self, planes: int, norm: Callable[[int], nn.Module], *, reduce: bool) -> None:
        super().__init__()
        self.reduce = _conv_norm(2 * planes, planes, norm) if reduce else nn.Identity()
        self.narrow = nn.Conv2d(planes, planes // 2, 1)
        self.narrow_norm = norm(planes // 2)
        self.join = _conv_norm(planes, planes, norm)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Upsample features to (B, p, 2h, 2w) and join them with skip (B, p/2, 2h, 2w)."""
        # A 1 x 1 convolution commutes with an interpolation, whose weights sum to one; done first,
        # it costs a quarter.
        narrow = self.narrow(self.reduce(features))
        wide = functional.interpolate(narrow, scale_factor=2, mode="bilinear", align_corners=False)
        joined: Tensor = self.join(
            torch.cat([skip, functional.relu(self.narrow_norm(wide))], dim=1)
        )
        return joined


class RestorationDecoder(nn.Module):
    """DSIR's second decoder: restores an image from the deepest map of its mixed copy.

    It has no skip connections and one BatchNorm per source domain (614 755 parameters at base width
    16 with three domains), and is used only in training.

    Args:
        base_width: w of the U-Net it belongs to.
        domains: D, source domains of the client.
        out_channels: Channels of an image.
    """

    def __init__(self, base_width: int, domains: int, out_channels: int = IN_CHANNELS) -> None:
        super().__init__()
        planes = [base_width << level for level in (4, 3, 2, 1)]
        self.blocks = nn.ModuleList(RestorationBlock(p, domains) for p in planes)
        self.head = nn.Conv2d(planes[-1] // 2, out_channels, 3, padding=1)
        initialise(self)

    def forward(self, deepest: Tensor, domain: int) -> Tensor:
        """Restore images (B, C, H, W) in [-1, 1] of one domain from (B, 16w, H/16, W/16) maps."""
        for block in self.blocks:
            deepest = block(deepest, domain)
        restored: Tensor = self.head(deepest).tanh()
        return restored


class RestorationBlock(nn.Module):
    """conv3x3 p -> p/2, bilinear x2, conv1x1, conv3x3.

    Each convolution is followed by the BatchNorm of the domain and ReLU.
    """

    def __init__(self, planes: int, domains: int) -> None:
        super().__init__()
        half = planes // 2
        self.reduce = nn.Conv2d(planes, half, 3, padding=1)
        self.narrow = nn.Conv2d(half, half, 1)
        self.refine = nn.Conv2d(half, half, 3, padding=1)
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(half) for _ in range(domains)) for _ in range(3)
        )

    def forward(self, features: Tensor, domain: int) -> Tensor:
        """Upsample features (B, p, h, w) to (B, p/2, 2h, 2w)."""
        features = functional.relu(self._norm(0, domain)(self.reduce(features)))
        # As in `DecoderBlock`, the 1 x 1 convolution commutes with the interpolation.
        wide = functional.interpolate(
            self.narrow(features), scale_factor=2, mode="bilinear", align_corners=False
        )
        features = functional.relu(self._norm(1, domain)(wide))
        return functional.relu(self._norm(2, domain)(self.refine(features)))

    def _norm(self, layer: int, domain: int) -> nn.Module:
        domains = self.norms[layer]
        if not isinstance(domains, nn.ModuleList):
            raise TypeError("the norms of a layer are a ModuleList")
        return domains[domain]


def projection_head(
    before: int, after: int, norm: Callable[[int], nn.Module], stride: int = 1
) -> nn.Sequential:
    """Return two 1 x 1 convolutions, without a final ReLU so that features may be negative."""
    return nn.Sequential(
        nn.Conv2d(before, before, 1, stride=stride),
        norm(before),
        nn.ReLU(inplace=True),
        nn.Conv2d(before, after, 1),
    )


def build_restoration(
    base_width: int, domains: int, generator_seed: int, channels: int = IN_CHANNELS
) -> RestorationDecoder:
    """Build a restoration decoder whose weights depend only on the seed, as `build_network`."""
    with without_draws():
        decoder = RestorationDecoder(base_width, domains, channels)
    initialise(decoder, torch.Generator().manual_seed(generator_seed))
    return decoder


def initialise(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise all weights: kaiming-normal layers, zero biases, unit norms.

    The fan is that of the output for a convolution, and of the input for a linear layer.

    Args:
        network: The network, changed in place.
        generator: Source of randomness; None is torch's global generator.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
            module.reset_parameters()


def build_network(
    settings: NetworkSettings, in_channels: int, out_channels: int, generator_seed: int | None
) -> nn.Module:
    """Build a network whose weights depend only on the seed, not on torch's global random state.

    Args:
        settings: Name, base width, norm and feature map; or a class by import path and its options.
        in_channels: Channels of an image.
        out_channels: Channels of the logits.
        generator_seed: Seed of the initialisation, e.g. `stream_seed(seed, "weights")`; None leaves
            the weights undefined, for a caller that loads all of them (drawing costs more than
            loading).

    Raises:
        FedsgcgError: CFG-011 for a class by import path that cannot be used.
    """
    if settings.is_own:
        return _build_own(
            settings.name, settings.options, in_channels, out_channels, generator_seed or 0
        )
    with without_draws():
        network = NETWORKS[settings.name](
            in_channels,
            out_channels,
            settings.base_width,
            settings.norm,
            settings.features,
            settings.projection,
            settings.domains,
            settings.projection_stride,
        )
    if generator_seed is not None:
        initialise(network, torch.Generator().manual_seed(generator_seed))
    return network


def measure(network: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[int, str]:
    """Build a network by import path once and return its feature channels and normalisation.

    Args:
        network: Settings of the network, as plain values: `name` and `options`.
        data: Settings of the data; `classes`, `structures` and `activation` decide the number of
            logits.

    Returns:
        A, and `batch` for a network with BatchNorm, `group` for any other.

    Raises:
        FedsgcgError: CFG-011 for a class that does not have the required interface.
    """
    classes = data["classes"] if data["activation"] == "softmax" else data["structures"]
    options = tuple(sorted(network["options"].items()))
    channels = channels_of(int(data.get("stack", IN_CHANNELS)))
    return _measured(str(network["name"]), options, channels, len(classes))


@lru_cache(maxsize=64)
def _measured(
    name: str, options: tuple[tuple[str, Any], ...], in_channels: int, out_channels: int
) -> tuple[int, str]:
    network = _build_own(name, dict(options), in_channels, out_channels, 0).eval()
    side = 4 * DOWNSAMPLING
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            answer = network(torch.zeros(1, in_channels, side, side))
    except Exception as error:  # user code may raise anything
        expected = (
            f"a network that takes images (B, {in_channels}, H, W), "
            f"H and W multiples of {DOWNSAMPLING}"
        )
        raise unusable(name, f"{type(error).__name__}: {error}", "network", expected) from error
    expected = (
        f"logits (1, {out_channels}, {side}, {side}) and a feature map (1, A, h, w), "
        f"h = w a divisor of {side}"
    )
    pair = isinstance(answer, tuple) and len(answer) == 2
    if not (pair and all(isinstance(part, Tensor) for part in answer)):
        raise unusable(name, f"{type(answer).__name__} from forward", "network", expected)
    logits, features = answer
    square = (
        features.ndim == 4
        and features.shape[2] == features.shape[3]
        and side % features.shape[2] == 0
    )
    if tuple(logits.shape) != (1, out_channels, side, side) or not square:
        found = f"logits {tuple(logits.shape)}, feature map {tuple(features.shape)}"
        raise unusable(name, found, "network", expected)
    stated = getattr(network, "num_features", None)
    if stated != features.shape[1]:
        found = f"num_features {stated}, but {features.shape[1]} channels"
        expected = "an attribute num_features with the channels of the feature map"
        raise unusable(name, found, "network", expected)
    batch = any(
        isinstance(module, _BatchNorm) and module.track_running_stats
        for module in network.modules()
    )
    return int(features.shape[1]), "batch" if batch else "group"


def _build_own(
    name: str, options: Mapping[str, Any], in_channels: int, out_channels: int, seed: int
) -> nn.Module:
    """Build a network by import path; its initialisation depends only on the seed."""
    cls = load_class(name, "network")
    if not issubclass(cls, nn.Module):
        raise unusable(name, "a class that is not a Module", "network", "a torch.nn.Module")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return cls(in_channels, out_channels, **options)
        except Exception as error:  # user code may raise anything
            expected = f"{cls.__name__}(in_channels, out_channels, **options)"
            raise unusable(name, f"{type(error).__name__}: {error}", "network", expected) from error


class without_draws(TorchFunctionMode):  # noqa: N801  (a context manager)
    """Builds torch's layers without drawing their weights, which stay undefined.

    The draws would advance torch's global generator. Building on the `meta` device avoids them too,
    but imports nine hundred modules of torch's compiler, which takes three seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS or getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_DRAWS: Final = (torch.Tensor.uniform_, torch.Tensor.normal_)
"""A mode does not see every function of `nn.init`: of `kaiming_normal_` it sees only the draw."""


def _encoder_block(before: int, after: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    # No ReLU after the first convolution, as in RAM-DSIR.
    entry = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), norm(after))
    return nn.Sequential(entry, _conv_norm(after, after, norm), _conv_norm(after, after, norm))


def _conv_norm(before: int, after: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), norm(after), nn.ReLU(inplace=True))


NETWORKS: Final[dict[str, Callable[[int, int, int, str, str, int, int, int], UNet]]] = {
    "unet": UNet
}
"""Networks by name; called with the arguments of `UNet`."""
