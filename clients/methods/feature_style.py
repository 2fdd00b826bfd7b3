"""MixStyle, DSU and TriD change the channel means and deviations of early feature maps in training.

    x' = s' (x - m) / s + m'

with the mean m and deviation s of each channel of each image, and new m', s'. The encoder's blocks
are changed after their output, and so are the skip connections. Evaluation runs the plain network.

A method draws for each layer whether a batch is changed. Statistics over a batch and partners in it
are those of a part, if a step is split for memory, as with BatchNorm.

Legend: B batch, C channels of a map, L changed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods.base import Source, View
from fedsgcg.common.errors import fail
from fedsgcg.common.settings.plan import Plan

EPSILON: Final = 1e-6
"""Added to variances, as in the published code of both methods."""

Change = Callable[[Tensor], Tensor]


class StyleMethod(Source):
    """Supervised training with changed feature statistics in some encoder blocks."""

    def __init__(self, network: nn.Module, plan: Plan, domains: int, device: torch.device) -> None:
        super().__init__(network, plan, domains, device)
        self._layers = encoder_blocks(network, self._blocks())

    def _blocks(self) -> Sequence[int]:
        raise NotImplementedError

    def _change(self, layer: int, drawn: Sequence[Tensor]) -> Change:
        """Return the change of the layer's output, given the step's random numbers."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> list[View]:
        """Run the network with changed feature statistics."""
        changes = [self._change(layer, batch.drawn) for layer in range(len(self._layers))]
        with changed_outputs(self._layers, changes):
            return [self.view("source", batch.images)]


class MixStyle(StyleMethod):
    """MixStyle: feature statistics are mixed with those of another image of the batch.

    Formula: s' = r s + (1 - r) s_p, m' = r m + (1 - r) m_p with a partner p of the batch and
        r from Beta(alpha, alpha); with probability 1/2 a batch stays as it is.
    Leaves: weights.
    Defaults: alpha = 0.1, probability 0.5 and early layers as published. The partner is any image
        of the client's batch; a client with one hospital mixes within that hospital.
    Source: Zhou et al., Domain Generalization with MixStyle, ICLR 2021, eqs. 4-6.
    """

    def _blocks(self) -> Sequence[int]:
        return self.plan.method.mixstyle.blocks

    def draw(
        self, sizes: Sequence[int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], ...]:
        """Draw for each layer whether the batch is mixed, the ratios and the partners' ranks."""
        settings, shape = self.plan.method.mixstyle, (sum(sizes), len(self._layers))
        mixed = rng.random((1, shape[1])) < settings.probability
        ratio = np.where(mixed, rng.beta(settings.alpha, settings.alpha, shape), 1.0)
        return ratio.astype(np.float32), rng.random(shape).astype(np.float32)

    def _change(self, layer: int, drawn: Sequence[Tensor]) -> Change:
        ratio, rank = (one[:, layer] for one in drawn)
        return lambda maps: mix_style(maps, ratio, rank.argsort())


class Dsu(StyleMethod):
    """DSU: feature statistics are drawn from their uncertainty, the spread over the batch.

    Formula: m' = m + e_m S_m, s' = s + e_s S_s with the standard deviations S_m, S_s over the batch
        of the images' m and s, and standard normal e; with probability 1/2 a batch stays as it is.
    Leaves: weights.
    Defaults: probability 0.5, factor 1 as published; the published code changes six places of a
        ResNet, here the first three blocks of the encoder.
    Source: Li et al., Uncertainty Modeling for Out-of-Distribution Generalization, ICLR 2022,
        eqs. 3-10.
    """

    def _blocks(self) -> Sequence[int]:
        return self.plan.method.dsu.blocks

    def draw(
        self, sizes: Sequence[int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], ...]:
        """Draw two normal numbers for each channel, 0 where a layer's batch stays as it is."""
        settings = self.plan.method.dsu
        drawn = []
        for channels in (channels_of(layer) for layer in self._layers):
            factor = settings.factor * (rng.random() < settings.probability)
            drawn.append(factor * rng.standard_normal((sum(sizes), 2, channels)))
        return tuple(one.astype(np.float32) for one in drawn)

    def _change(self, layer: int, drawn: Sequence[Tensor]) -> Change:
        noise = drawn[layer]
        return lambda maps: draw_style(maps, noise[:, 0], noise[:, 1])


def mix_style(maps: Tensor, ratio: Tensor, partner: Tensor) -> Tensor:
    """Mix feature statistics with those of partners; statistics are constants, as published.

    Args:
        maps: (B, C, H, W).
        ratio: (B,) share of an image's own statistics; 1 leaves it unchanged.
        partner: (B,) index of each image's partner.
    """
    mean, deviation = (one.detach() for one in style(maps))
    share = ratio.to(mean.dtype).view(-1, 1, 1, 1)
    new_mean = share * mean + (1 - share) * mean[partner]
    new_deviation = share * deviation + (1 - share) * deviation[partner]
    return restyled(maps, mean, deviation, new_mean, new_deviation)


def draw_style(maps: Tensor, of_mean: Tensor, of_deviation: Tensor) -> Tensor:
    """Move feature statistics by multiples of their spread over the batch.

    Args:
        maps: (B, C, H, W).
        of_mean: (B, C) multiples for the means.
        of_deviation: (B, C) multiples for the deviations.
    """
    mean, deviation = style(maps)
    moves = [
        noise.to(mean.dtype)[:, :, None, None] * (one.var(0, correction=0) + EPSILON).sqrt()
        for noise, one in ((of_mean, mean), (of_deviation, deviation))
    ]
    return restyled(maps, mean, deviation, mean + moves[0], deviation + moves[1])


def style(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of each image, (B, C, 1, 1) float32."""
    maps = maps.float() if maps.dtype in (torch.bfloat16, torch.float16) else maps
    variance, mean = torch.var_mean(maps, (2, 3), correction=0, keepdim=True)
    return mean, (variance + EPSILON).sqrt()


def restyled(
    maps: Tensor, mean: Tensor, deviation: Tensor, new_mean: Tensor, new_deviation: Tensor
) -> Tensor:
    """Return maps (B, C, H, W) with other statistics, (B, C, 1, 1) each."""
    return (new_deviation * ((maps - mean) / deviation) + new_mean).to(maps.dtype)


def encoder_blocks(network: nn.Module, numbers: Sequence[int]) -> list[nn.Module]:
    """Return the encoder's blocks with these numbers, from 1.

    Raises:
        FedsgcgError: TRN-320 for a network without such blocks.
    """
    blocks = getattr(getattr(network, "encoder", None), "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or max(numbers) > len(blocks):
        raise fail(
            "TRN-320",
            found=f"{type(network).__name__} without {max(numbers)} blocks in encoder.blocks",
            expected="a network with an encoder of several blocks",
            action="use network=unet or another method",
        )
    return [blocks[number - 1] for number in numbers]


def channels_of(block: nn.Module) -> int:
    """Return the number of channels of a block's output."""
    convolutions = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
    return convolutions[-1].out_channels


@contextmanager
def changed_outputs(layers: Sequence[nn.Module], changes: Sequence[Change]) -> Iterator[None]:
    """Change the outputs of layers while the context is open."""

    def hook(change: Change) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _layer, _inputs, output: change(output)

    handles = [
        layer.register_forward_hook(hook(change))
        for layer, change in zip(layers, changes, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
